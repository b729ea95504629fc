"""Products that are one entry each, with something done around it: `tinygemm_bf16`, cuBLASLt's
algorithms of `bmm_fp8`, and fp8 products with scales of blocks.

`fp8_blockscale_gemm_90` (SM90) makes an object that quantises what is not in fp8 into memory it
was told of before, and lays it out for the most rows that it was ever asked about.  The others
with scales of blocks are entries of `gemm_sm100`, and called otherwise of `gemm_sm120`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, frozen, parse_dtype
from fi_ffi.errors import ArgumentError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call.arguments import INT64_MAX, check_int
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.launching import Launch, PreparedSteps, launching, prepare_row
from fi_ffi.ops.call.memory import scratch_for
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.matmul.rows import E4M3
from fi_ffi.ops.notation import round_up
from fi_ffi.ops.providers import check_available, release_in_use
from fi_ffi.ops.row import Row, Tensor, form_on

if TYPE_CHECKING:
    from fi_ffi.loader.methods import ModuleObject
    from fi_ffi.ops.call.prepared import Prepared

GET_ALGOS, RUN_WITH_ALGO = Op(*rows.GET_ALGOS), Op(*rows.RUN_WITH_ALGO)
_BLOCK_SCALE = "fp8_blockscale_gemm_sm90"
RUN_GEMM = CompiledRow(
    rows.RUN_GEMM, op=_BLOCK_SCALE,
    names={"output": "out", "scales_a": "input_scale", "scales_b": "weight_scale"},
)  # fmt: skip
CONFIGURE = CompiledRow(rows.CONFIGURE, op=_BLOCK_SCALE)
_NAMES = {
    "A": "a", "B": "b", "SFA": "a_scale", "SFB": "b_scale", "C": "out", "D": "out",
    "float_workspace_buffer": "workspace_buffer",
}  # fmt: skip
GROUPWISE, GROUP_GROUPWISE = (
    {row: CompiledRow(row, names=_NAMES) for row in forms}
    for forms in (rows.GROUPWISE, rows.GROUP_GROUPWISE)
)


@functools.cache
def tinygemm_row(row: Row) -> CompiledRow:
    """A row of either, whose tensors are named as the function has them."""
    return CompiledRow(row, op="tinygemm_bf16", names={"output": "out"})


def _prepare_tinygemm(
    input: TensorLike, out: TensorLike, bias: TensorLike | None, stream: object, **given: Any
) -> Prepared:  # fmt: skip
    op = OPS["tinygemm2_nobias" if bias is None else "tinygemm2"]
    if as_desc(input, "tinygemm_bf16", "input").device.is_cuda and not op.has_release:
        op.select_release(release_in_use())
    more = {} if bias is None else {"bias": bias}
    return prepare_row(tinygemm_row(op.row), stream, input=input, output=out, **more, **given)


@launching(_prepare_tinygemm)
def tinygemm_bf16(
    input: TensorLike,
    weight: TensorLike,
    out: TensorLike,
    bias: TensorLike | None = None,
    use_pdl: bool = False,
    *,
    stream: object = None,
) -> None:
    """`out = input @ weight.T + bias` for few rows: `tinygemm2`, or `tinygemm2_nobias`.

    Args:
        input: [n, k] bfloat16; weight: [m, k]; out: [n, m], written; bias: [m], or None.
        use_pdl: see `tinygemm2`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/gemm/routergemm.py, csrc/tinygemm2.cu.
    """
    if bias is None:
        OPS["tinygemm2_nobias"](input, weight, out, use_pdl, stream=stream)
    else:
        OPS["tinygemm2"](input, weight, bias, out, use_pdl, stream=stream)


# cuBLASLt's algorithms: asked for once, then called without asking again.


def _with_handle(op: Op, cublas_handle: int, **values: Any) -> dict[str, Any]:
    """What the row in force is given."""
    name, handle = op.row.name, cublas_handle
    left = values["A"] = as_desc(values["A"], name, "A")
    if left.device.is_cuda and not op.has_release:
        op.select_release(release_in_use())
    if any(arg.name == "cublas_handle" for arg in op.row.args):
        values["cublas_handle"] = handle
    elif handle:  # from FlashInfer 0.7 on, the kernels make their own
        raise ArgumentError(name, "cublas_handle", got=handle, expected="0")
    return values


def _prepare_algos(op: Op, stream: object, **given: Any) -> Prepared:
    return op.prepare(**_with_handle(op, **given), stream=stream)


@launching(functools.partial(_prepare_algos, GET_ALGOS))
def bmm_fp8_get_algos(
    A: TensorLike,
    B: TensorLike,
    D: TensorLike,
    A_scale: TensorLike,
    B_scale: TensorLike,
    algo_buffer: TensorLike,
    workspace_buffer: TensorLike | None = None,
    cublas_handle: int = 0,
    *,
    stream: object = None,
) -> int:
    """How many algorithms cuBLASLt has for such a `bmm_fp8`, the one it thinks best first.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as of `bmm_fp8`; nothing is
            computed, and only shapes, dtypes and the workspace's size matter.
        algo_buffer: uint8 on the host, written: 64 bytes for each algorithm that there is room
            for, 100 of them at most.

    What it writes is for this shape, these dtypes and this GPU.
    """
    values = _with_handle(
        GET_ALGOS, cublas_handle, A=A, B=B, D=D, A_scale=A_scale, B_scale=B_scale,
        algo_buffer=algo_buffer, workspace_buffer=workspace_buffer,
    )  # fmt: skip
    count: int = GET_ALGOS(**values, stream=stream)
    return count


@launching(functools.partial(_prepare_algos, RUN_WITH_ALGO))
def bmm_fp8_run_with_algo(
    A: TensorLike,
    B: TensorLike,
    D: TensorLike,
    A_scale: TensorLike,
    B_scale: TensorLike,
    algo_buffer: TensorLike,
    algo_idx: int,
    workspace_buffer: TensorLike | None = None,
    cublas_handle: int = 0,
    *,
    stream: object = None,
) -> None:
    """`bmm_fp8` by one of the algorithms that `bmm_fp8_get_algos` told.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as of `bmm_fp8`.
        algo_buffer, algo_idx: what `bmm_fp8_get_algos` wrote, and which of them.

    An algorithm of another shape or GPU is refused by cuBLASLt, with a `KernelError`.
    """
    values = _with_handle(
        RUN_WITH_ALGO, cublas_handle, A=A, B=B, D=D, A_scale=A_scale, B_scale=B_scale,
        algo_buffer=algo_buffer, workspace_buffer=workspace_buffer, algo_idx=algo_idx,
    )  # fmt: skip
    RUN_WITH_ALGO(**values, stream=stream)


# Scales of blocks, SM90.

_BLOCK = 128
_LEAST = 256  # bytes: the object wants some memory even where it has no use for it
_ROOM = Tensor("workspace_buffer", "bytes", "uint8", "", bytes=_LEAST)
_SIZE = Signature("get_workspace_size", ("int", "int", "int"), "int")
# One product at a time: each tells the object of its memory, and the next may take another.
_lock = threading.Lock()
# By device: the object, and the most rows that it makes room for.
_rows: dict[int, tuple[ModuleObject, int]] = {}


def _expect(device: Device, m: int, n: int, k: int) -> int:
    """Announce a product to the object; returns the rows that it lays its memory out for."""
    from fi_ffi.loader import methods

    row = rows.RUN_GEMM
    made = methods.made_by(row.module, row.factory, row.releases, device.index)
    made.entry(_SIZE)(m, n, k)
    known, most = _rows.get(device.index, (made, 0))
    # Of other kernels than before, it is another object.
    most = max(most if known is made else 0, -(-m // 4) * 4)
    _rows[device.index] = made, most
    return most


def _prepare_blockscale(stream: object, **tensors: Any) -> PreparedSteps:
    prepared = PreparedSteps(_BLOCK_SCALE, tensors, _checked_gemm, stream)
    device = as_desc(tensors["input"], _BLOCK_SCALE, "input").device
    if device.is_cuda:
        check_available(rows.RUN_GEMM, device)
    return prepared


@launching(_prepare_blockscale)
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
            `fp8_quantize_1x128` writes it, or the first m columns of that.  That is not
            [m, k / 128], which FlashInfer's documentation says and its kernels do not read.
        weight_scale: of an fp8 weight, [n / 128 rounded up, k / 128] float32: for each block of
            128 x 128; not [n, k / 128], of which the kernels read the first rows so: docs/gemm.md.
        out: [m, n] bfloat16, written.
        workspace_buffer: uint8 scratch for what is quantised, of as many bytes as
            `fp8_blockscale_gemm_workspace_size` tells; without it each stream has its own of
            fi_ffi's.

    A bfloat16 weight is clipped on the way, as the kernels have it: docs/gemm.md.  Raises
    `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError` on
    GPUs other than Hopper's.
    Upstream: flashinfer/gemm/gemm_base.py, csrc/fp8_blockscale_gemm_sm90_binding.cu.
    """
    _checked_gemm(input, weight, input_scale, weight_scale, out, workspace_buffer)(stream)


def _checked_gemm(
    input: TensorLike, weight: TensorLike, input_scale: TensorLike | None,
    weight_scale: TensorLike | None, out: TensorLike | None, workspace_buffer: TensorLike | None,
) -> Launch:  # fmt: skip
    """A product that is checked, and what launches it on a stream."""
    if input_scale is not None:
        input_scale = _with_room(as_desc(input_scale, _BLOCK_SCALE, "input_scale"))
    values = (input, weight, out, input_scale, weight_scale)
    device = as_desc(input, _BLOCK_SCALE, "input").device
    descs, sizes = RUN_GEMM.check(*values)
    if not device.is_cuda:
        return lambda stream: RUN_GEMM.call(None, *descs.values(), stream=stream)
    m, n, depth = sizes["m"], sizes["n"], sizes["k128"]
    if not m:
        return lambda stream: None
    left, right = descs["input"], descs["weight"]
    given = None
    if workspace_buffer is not None:
        given = as_desc(workspace_buffer, _BLOCK_SCALE, _ROOM.name)
        CONFIGURE.check(given)
        if given.device is not device:
            expected = f"{device}, the device of `input`"
            raise RUN_GEMM.refuse.error(_ROOM.name, given.device, expected)
        RUN_GEMM.refuse.apart(_ROOM.name, given, descs)

    def launch(stream: object) -> None:
        handle_for(stream, device, _BLOCK_SCALE)  # a missing one is told first
        check_available(rows.RUN_GEMM, device)
        with _lock:
            most = _expect(device, m, n, depth * _BLOCK)
            need = _bytes(most, left.dtype.name, right.dtype.name, n, depth * _BLOCK)
            room = given
            if room is None:
                room = scratch_for(RUN_GEMM.refuse, _ROOM, device, need, stream, False)
            elif room.numel < need:
                RUN_GEMM.refuse.scratch(_ROOM.name, room.numel, need)
            CONFIGURE.call(None, room, stream=stream)
            RUN_GEMM.call(None, *descs.values(), stream=stream)

    return launch


def _with_room(scales: TensorDesc) -> TensorDesc:
    """View the first m columns of scales as all the m4 that there are: kernels read those too."""
    if len(scales.shape) != 2:
        return scales
    count, rows = scales.shape
    room = round_up(rows, 4)
    if room == rows or scales.strides != (room, 1):
        return scales
    return frozen(scales.ptr, (count, room), (room, 1), scales.kind, scales)


def fp8_blockscale_gemm_workspace_size(
    m: int, n: int, k: int, input_dtype: object = "bfloat16", weight_dtype: object = "float8_e4m3fn"
) -> int:
    """Bytes that `workspace_buffer` of `fp8_blockscale_gemm_sm90` needs for such a product.

    `m` is the most rows that the process asks for, in any product: the kernels lay the memory
    out for those.
    """
    op = "fp8_blockscale_gemm_workspace_size"
    for name, value in (("m", m), ("n", n), ("k", k)):
        check_int(op, name, value, 0, INT64_MAX)
    of_input = parse_dtype(input_dtype, op=op, argument="input_dtype").name
    of_weight = parse_dtype(weight_dtype, op=op, argument="weight_dtype").name
    return _bytes(-(-m // 4) * 4, of_input, of_weight, n, k)


def _bytes(rows: int, of_input: str, of_weight: str, n: int, k: int) -> int:
    """The bytes of what the object writes: fp8 values and their scales."""
    need, depth = _LEAST, -(-k // _BLOCK)
    if of_input not in E4M3:
        need += rows * (k + 4 * depth)
    if of_weight not in E4M3:
        need += n * k + 4 * -(-n // _BLOCK) * depth
    return need


# Scales of blocks, SM100 and SM120.


def _granularity(op: str, value: Sequence[int]) -> tuple[int, ...]:
    """Rows, columns and depth of the blocks that have a scale each."""
    known = ((1, 128, 128), (128, 128, 128))
    if isinstance(value, (tuple, list)) and all(isinstance(size, Integral) for size in value):
        for sizes in known:
            if tuple(value) == sizes:
                return sizes
    expected = " or ".join(map(str, known))
    raise ArgumentError(op, "scale_granularity_mnk", got=value, expected=expected)


def _form(forms: dict[Row, CompiledRow], a: TensorDesc, mma_sm: int) -> tuple[CompiledRow, Any]:
    """The form of the GPU that `a` is on, and what only that of SM100 is told."""
    capability = None
    if a.device.is_cuda:
        # Where there is no such GPU the call says so, after what is wrong with its arguments.
        with contextlib.suppress(LoaderError):
            capability = machine.capability(a.device.index)
    row = form_on([*forms], capability)
    check_int(row.name, "mma_sm", mma_sm, 1, 2)
    return forms[row], (mma_sm,) if any(arg.name == "mma_sm" for arg in row.args) else ()


def _prepare_groupwise(
    stream: object, scale_granularity_mnk: Sequence[int], scale_major_mode: str, mma_sm: int,
    **given: Any,
) -> Prepared:  # fmt: skip
    sizes = _granularity("gemm_fp8_nt_groupwise", scale_granularity_mnk)
    given["a"] = as_desc(given["a"], "gemm_fp8_nt_groupwise", "a")
    form, more = _form(GROUPWISE, given["a"], mma_sm)
    tensors = (given[name] for name in ("workspace_buffer", "a", "b", "a_scale", "b_scale", "out"))
    return prepare_row(form, stream, *tensors, *sizes, scale_major_mode, *more)


@launching(_prepare_groupwise)
def gemm_fp8_nt_groupwise(
    a: TensorLike,
    b: TensorLike,
    a_scale: TensorLike,
    b_scale: TensorLike,
    scale_major_mode: str,
    mma_sm: int = 1,
    scale_granularity_mnk: Sequence[int] = (1, 128, 128),
    out: TensorLike | None = None,
    *,
    workspace_buffer: TensorLike | None = None,
    stream: object = None,
) -> None:
    """`out = (a * a_scale) @ (b * b_scale).T`, with a scale for each block; SM100 and SM120.

    Args:
        a: [m, k] and b: [n, k], both float8_e4m3fn or both float8_e5m2; k is a multiple of 128,
            n of 8, and m of 4; on SM120 n is one of 128, and m of gm.
        a_scale: float32, one for each block of `a`: [m / gm, k / 128] in mode "K",
            [k / 128, m / gm] in mode "MN"; b_scale: the same of `b`.
        scale_granularity_mnk: (gm, 128, 128), where gm is 1 or 128.
        out: [m, n] float16 or bfloat16, written.
        mma_sm: 1, or 2 for products of two multiprocessors, quicker for many rows; the kernels of
            SM120 have no use for it.
        workspace_buffer: uint8 scratch, 32 MiB; without it each stream has its own of fi_ffi's.

    Upstream: flashinfer/gemm/gemm_base.py, csrc/gemm_groupwise_sm100.cu,
    csrc/gemm_groupwise_sm120.cu.
    """
    granularity = _granularity("gemm_fp8_nt_groupwise", scale_granularity_mnk)
    left = as_desc(a, "gemm_fp8_nt_groupwise", "a")
    form, more = _form(GROUPWISE, left, mma_sm)
    form.call(
        None, workspace_buffer, left, b, a_scale, b_scale, out, *granularity, scale_major_mode,
        *more, stream=stream,
    )  # fmt: skip


def _prepare_grouped(
    stream: object, scale_granularity_mnk: Sequence[int], scale_major_mode: str, mma_sm: int,
    **given: Any,
) -> Prepared:  # fmt: skip
    sizes = _granularity("group_gemm_fp8_nt_groupwise", scale_granularity_mnk)
    given["a"] = as_desc(given["a"], "group_gemm_fp8_nt_groupwise", "a")
    form, more = _form(GROUP_GROUPWISE, given["a"], mma_sm)
    tensors = (given[name] for name in ("a", "b", "a_scale", "b_scale", "out", "m_indptr"))
    return prepare_row(
        form, stream, None, None, *tensors, None, None, *sizes, scale_major_mode, *more
    )


@launching(_prepare_grouped)
def group_gemm_fp8_nt_groupwise(
    a: TensorLike,
    b: TensorLike,
    a_scale: TensorLike,
    b_scale: TensorLike,
    m_indptr: TensorLike,
    scale_granularity_mnk: Sequence[int] = (1, 128, 128),
    scale_major_mode: str = "MN",
    mma_sm: int = 1,
    out: TensorLike | None = None,
    *,
    stream: object = None,
) -> None:
    """`gemm_fp8_nt_groupwise` of rows in groups, each with a matrix of its own; SM100 and SM120.

    Args:
        a: [m, k]; b: [groups, n, k], where n of several groups is a multiple of 128.  On SM120
            there is one group: FlashInfer knows of wrong products where there are more.
        a_scale: as of `gemm_fp8_nt_groupwise`; b_scale: one such for each group.
        m_indptr: [groups + 1] int32: where each group's rows start, and the end; multiples of 4,
            and of gm.  It is on the GPU and is not looked at before the launch.
        out: [m, n] float16 or bfloat16, written.
        others: as of `gemm_fp8_nt_groupwise`; scales of 128 rows in mode "K", unless m or k is
            128 at most (docs/gemm.md).

    Upstream: flashinfer/gemm/gemm_base.py, csrc/group_gemm_fp8_groupwise_sm100.cu,
    csrc/group_gemm_fp8_groupwise_sm120.cu.
    """
    granularity = _granularity("group_gemm_fp8_nt_groupwise", scale_granularity_mnk)
    left = as_desc(a, "group_gemm_fp8_nt_groupwise", "a")
    form, more = _form(GROUP_GROUPWISE, left, mma_sm)
    form.call(
        None, None, None, left, b, a_scale, b_scale, out, m_indptr, None, None, *granularity,
        scale_major_mode, *more, stream=stream,
    )  # fmt: skip
