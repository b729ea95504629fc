"""fp8 products with scales of blocks, on SM90: FlashInfer's `fp8_blockscale_gemm_90`.

The module makes an object that quantises what is not in fp8 into memory it was told of before,
and lays it out for the most rows that it was ever asked about.
"""

from __future__ import annotations

import threading
from typing import Any

from fi_ffi.abi.device import Device
from fi_ffi.abi.dtypes import DType, parse_dtype
from fi_ffi.abi.function import Entry, module_function
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.objects import Module
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.matmul.entries import RUN_GEMM, as_called
from fi_ffi.ops.matmul.rows import E4M3
from fi_ffi.ops.memory import scratch_for
from fi_ffi.ops.providers import check_available
from fi_ffi.ops.row import Tensor
from fi_ffi.ops.settled import on
from fi_ffi.ops.values import check_address

_OP = "fp8_blockscale_gemm_sm90"
_NAMES = {"output": "out", "scales_a": "input_scale", "scales_b": "weight_scale"}
_BLOCK = 128
_ALIGNMENT = 256
_LEAST = 256  # bytes: the object wants some memory even where it has no use for it
_WORKSPACE = Tensor("workspace_buffer", "bytes", "uint8", "", writes=True, reads=False,
                    contiguous=True, bytes_for=lambda sizes: sizes["bytes"])  # fmt: skip


class _Runner:
    """The object's state: what it was last told, and the most rows that it knows of."""

    def __init__(self, made: Module) -> None:
        self.made, self.rows = made, 0
        self._ask = module_function(made, "get_workspace_size")
        self._tell: Entry = module_function(made, "configure_workspace")

    def expect(self, rows: int, columns: int, depth: int) -> int:
        """Tell it of a product; the rows that it makes room for."""
        self._ask(rows, columns, depth)
        self.rows = max(self.rows, -(-rows // 4) * 4)
        return self.rows

    def use(self, memory: TensorDesc) -> None:
        self._tell(memory)


# One product at a time: each tells the object of its memory, and the next may take another.
_lock = threading.Lock()
_runners: dict[int, _Runner] = {}


def _runner(device: Device) -> _Runner:
    from fi_ffi.loader import methods

    row = RUN_GEMM.row
    made = methods.made_by(row.module, row.factory, row.releases, device.index)
    known = _runners.get(device.index)
    # Of other kernels than before, it is another object.
    if known is None or known.made is not made:
        known = _runners[device.index] = _Runner(made)
    return known


def _refuse(argument: str, got: object, expected: str) -> ArgumentError:
    return ArgumentError(_OP, argument, got=got, expected=expected)


def _scale(
    name: str, of: TensorDesc, value: Any, shape: tuple[int, int], told: str
) -> TensorDesc | None:
    """The scales of fp8 values; None of others, which the kernels quantise."""
    if of.dtype.name not in E4M3:
        if value is not None:
            expected = f"None: the kernels quantise {of.dtype} themselves"
            raise _refuse(name, "a tensor", expected)
        return None
    if value is None:
        raise _refuse(name, None, f"scales of shape {shape}, {told}")
    desc = as_desc(value, _OP, name)
    if desc.shape != shape:
        raise _refuse(name, desc.layout, f"shape {shape}, {told}")
    return desc


def fp8_blockscale_gemm_sm90(
    input: TensorLike,
    weight: TensorLike,
    input_scale: TensorLike | None = None,
    weight_scale: TensorLike | None = None,
    out: TensorLike | None = None,
    *,
    workspace_buffer: TensorLike | None = None,
    stream: object = None,
) -> None:
    """`out = (input * input_scale) @ (weight * weight_scale).T` in fp8, a scale for each block.

    Args:
        input: [m, k] bfloat16, which is quantised on the way, or float8_e4m3fn; k is a multiple
            of 128, 20480 at most.
        weight: [n, k] bfloat16 (with a bfloat16 input) or float8_e4m3fn; n is a multiple of 64.
        input_scale: of an fp8 input, [k / 128, m rounded up to a multiple of 4] float32, as
            `fp8_quantize_1x128` writes it.  That is not [m, k / 128], which FlashInfer's
            documentation says and its kernels do not read.
        weight_scale: of an fp8 weight, [n / 128 rounded up, k / 128] float32: for each block of
            128 x 128.
        out: [m, n] bfloat16, written.
        workspace_buffer: uint8 scratch for what is quantised, of as many bytes as
            `fp8_blockscale_gemm_workspace_size` tells; without it each stream has its own of
            fi_ffi's.

    A bfloat16 weight is clipped on the way, as the kernels have it: docs/gemm.md.  Raises
    `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError` on
    GPUs other than Hopper's.
    Upstream: flashinfer/gemm/gemm_base.py, csrc/fp8_blockscale_gemm_sm90_binding.cu.
    """
    left, right = as_desc(input, _OP, "input"), as_desc(weight, _OP, "weight")
    for name, desc in (("input", left), ("weight", right)):
        if len(desc.shape) != 2:
            raise _refuse(name, desc.layout, "rank 2")
    (m, k), (n, _) = left.shape, right.shape
    depth = -(-k // _BLOCK)
    told = "as fp8_quantize_1x128 writes it"
    of_rows = _scale("input_scale", left, input_scale, (depth, -(-m // 4) * 4), told)
    told = "one for each block of 128 x 128"
    of_blocks = _scale("weight_scale", right, weight_scale, (-(-n // _BLOCK), depth), told)
    arguments = (left, right, out, of_rows, of_blocks)
    with as_called(_OP, _NAMES):
        if not left.device.is_cuda or not m:
            RUN_GEMM(*arguments, stream=stream)
            return
        given = None
        if workspace_buffer is not None:
            given = as_desc(workspace_buffer, _OP, _WORKSPACE.name)
            check_address(_OP, _WORKSPACE, given, _ALIGNMENT)
        on(stream, left.device, _OP)  # a missing one is told first
        check_available(RUN_GEMM.row, left.device)
        with _lock:
            runner = _runner(left.device)
            sizes = {"bytes": _bytes(runner.expect(m, n, k), left.dtype, right.dtype, n, k)}
            runner.use(scratch_for(RUN_GEMM.row, _WORKSPACE, left.device, given, stream, sizes))
            RUN_GEMM(*arguments, stream=stream)


def fp8_blockscale_gemm_workspace_size(
    m: int, n: int, k: int, input_dtype: object = "bfloat16", weight_dtype: object = "float8_e4m3fn"
) -> int:
    """Bytes that `workspace_buffer` of `fp8_blockscale_gemm_sm90` needs for such a product.

    `m` is the most rows that the process asks for, in any product: the kernels lay the memory
    out for those.
    """
    op = "fp8_blockscale_gemm_workspace_size"
    for name, value in (("m", m), ("n", n), ("k", k)):
        if type(value) is not int or value < 0:
            raise ArgumentError(op, name, got=value, expected="an int, 0 or more")
    dtypes = [
        parse_dtype(value, op=op, argument=name)
        for name, value in (("input_dtype", input_dtype), ("weight_dtype", weight_dtype))
    ]
    return _bytes(-(-m // 4) * 4, dtypes[0], dtypes[1], n, k)


def _bytes(rows: int, of_input: DType, of_weight: DType, n: int, k: int) -> int:
    """What the object writes: fp8 values, and their scales."""
    need, depth = _LEAST, -(-k // _BLOCK)
    if of_input.name not in E4M3:
        need += rows * (k + 4 * depth)
    if of_weight.name not in E4M3:
        need += n * k + 4 * -(-n // _BLOCK) * depth
    return need
