"""Products of one entry each with work around it: `tinygemm_bf16`, cuBLASLt's algorithms for
`bmm_fp8`, and fp8 products with block scales.

`fp8_blockscale_gemm_90` (SM90) makes an object. The object quantises inputs that are not fp8 into
memory that it was given before, and lays that memory out for the most rows it was ever asked about.
The other products with block scales are entries of `gemm_sm100`, and of `gemm_sm120` with other
arguments.
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
from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call.arguments import INT64_MAX, Refusal, check_int
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.memory import scratch_for
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.releases import check_available
from fi_ffi.ops.call.row import Row, Tensor, form_on
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.matmul.rows import E4M3
from fi_ffi.ops.steps.keyword_call import Launch, PreparedSteps, keyword_function, prepare_row
from fi_ffi.ops.steps.memory import check_apart

if TYPE_CHECKING:
    from fi_ffi.loader.methods import AttestedObject
    from fi_ffi.ops.call.prepared import Prepared

GET_ALGOS, RUN_WITH_ALGO = Op(*rows.GET_ALGOS), Op(*rows.RUN_WITH_ALGO)
_BLOCK_SCALE = "fp8_blockscale_gemm_sm90"
RUN_GEMM = CompiledRow(
    rows.RUN_GEMM,
    op=_BLOCK_SCALE,
    names={"output": "out", "scales_a": "input_scale", "scales_b": "weight_scale"},
)
CONFIGURE = CompiledRow(rows.CONFIGURE, op=_BLOCK_SCALE)
# The functions' names for the entries' arguments.
_NAMES = {
    "A": "a",
    "B": "b",
    "SFA": "a_scale",
    "SFB": "b_scale",
    "C": "out",
    "D": "out",
    "float_workspace_buffer": "workspace_buffer",
}
GROUPWISE, GROUP_GROUPWISE = (
    {row: CompiledRow(row, names=_NAMES) for row in forms}
    for forms in (rows.GROUPWISE, rows.GROUP_GROUPWISE)
)


@functools.cache
def tinygemm_row(row: Row) -> CompiledRow:
    """Compile a row of either kernel, with the function's names for the tensors."""
    return CompiledRow(row, op="tinygemm_bf16", names={"output": "out"})


def _prepare_tinygemm(
    input: TensorLike, out: TensorLike, bias: TensorLike | None, stream: object, **others: Any
) -> Prepared:
    op = OPS["tinygemm2_nobias" if bias is None else "tinygemm2"]
    if bias is not None:
        others["bias"] = bias
    return prepare_row(tinygemm_row(op.row), stream, input=input, output=out, **others)


@keyword_function(_prepare_tinygemm)
def tinygemm_bf16(
    input: TensorLike,
    weight: TensorLike,
    out: TensorLike,
    bias: TensorLike | None = None,
    use_pdl: bool = False,
    *,
    stream: object = None,
) -> None:
    """Compute `out = input @ weight.T + bias` for few rows, by `tinygemm2` or `tinygemm2_nobias`.

    Args:
        input: [n, k] bfloat16.
        weight: [m, k] bfloat16.
        out: [n, m] bfloat16, written.
        bias: [m] bfloat16, or None.
        use_pdl: see `tinygemm2`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/gemm/routergemm.py, csrc/tinygemm2.cu.
    """
    if bias is None:
        OPS["tinygemm2_nobias"](input, weight, out, use_pdl, stream=stream)
    else:
        OPS["tinygemm2"](input, weight, bias, out, use_pdl, stream=stream)


# cuBLASLt's algorithms: one query, then calls without the query.


def _with_handle(op: Op, cublas_handle: int, **values: Any) -> dict[str, Any]:
    """Add the handle to the arguments, if the row in force takes one."""
    values["A"] = as_desc(values["A"], op.row.name, "A")
    if any(arg.name == "cublas_handle" for arg in op.row.args):
        values["cublas_handle"] = cublas_handle
    elif cublas_handle:  # from FlashInfer 0.7 on, the kernels make their own handle
        raise Refusal(op.row.name)("cublas_handle", cublas_handle, "0")
    return values


def _prepare_algos(op: Op, **values: Any) -> Prepared:
    return op.prepare(**_with_handle(op, **values))


@keyword_function(functools.partial(_prepare_algos, GET_ALGOS))
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
    """Number of cuBLASLt's algorithms for this `bmm_fp8`; algorithm 0 is its first choice.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as in `bmm_fp8`. Nothing is
            computed: only shapes, dtypes and the workspace's size matter.
        algo_buffer: uint8 on the host, written: 64 bytes for each algorithm, at most 100 of them.

    The algorithms are for this shape, these dtypes and this GPU.
    """
    count: int = GET_ALGOS(**_with_handle(GET_ALGOS, **locals()))
    return count


@keyword_function(functools.partial(_prepare_algos, RUN_WITH_ALGO))
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
    """`bmm_fp8` with one of the algorithms that `bmm_fp8_get_algos` counts.

    Args:
        A, B, D, A_scale, B_scale, workspace_buffer, cublas_handle: as in `bmm_fp8`.
        algo_buffer: the buffer that `bmm_fp8_get_algos` wrote.
        algo_idx: the index of the algorithm in it.

    cuBLASLt refuses an algorithm of another shape or GPU with a `KernelError`.
    """
    RUN_WITH_ALGO(**_with_handle(RUN_WITH_ALGO, **locals()))


# Block scales, SM90.

_BLOCK = 128
_LEAST = 256  # bytes that the object requires even if it uses none
_ROOM = Tensor("workspace_buffer", "bytes", "uint8", "", bytes=_LEAST)
_SIZE = Signature("get_workspace_size", ("int", "int", "int"), "int")
# Held for one product: each product sets the object's memory, and the next may set another.
_lock = threading.Lock()
# By device: the object, and the rows that its memory is laid out for.
_rows: dict[int, tuple[AttestedObject, int]] = {}


def _announce(device: Device, m: int, n: int, k: int) -> int:
    """Announce a product to the object; return the rows for which it lays its memory out."""
    from fi_ffi.loader import methods

    row = rows.RUN_GEMM
    gemm = methods.made_by(row.module, row.factory, row.releases, device.index)
    gemm.entry(_SIZE)(m, n, k)
    known, most = _rows.get(device.index, (gemm, 0))
    # Other kernels than before have another object, which starts at 0 rows.
    most = max(most if known is gemm else 0, round_up(m, 4))
    _rows[device.index] = gemm, most
    return most


def _prepare_blockscale(stream: object, **tensors: Any) -> PreparedSteps:
    prepared = PreparedSteps(_BLOCK_SCALE, tensors, _checked_gemm, stream)
    device = as_desc(tensors["input"], _BLOCK_SCALE, "input").device
    if device.is_cuda:
        check_available(rows.RUN_GEMM, device)
    return prepared


@keyword_function(_prepare_blockscale)
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
    """Compute `out = (input * input_scale) @ (weight * weight_scale).T` in fp8 with block scales.

    Args:
        input: [m, k] bfloat16, which the kernels quantise, or float8_e4m3fn; k is a multiple of
            128, at most 20480.
        weight: [n, k] bfloat16 (with a bfloat16 input) or float8_e4m3fn; n is a multiple of 64.
        input_scale: with an fp8 input, [k / 128, m rounded up to a multiple of 4] float32, as
            `fp8_quantize_1x128` writes it, or its first m columns. FlashInfer's documentation says
            [m, k / 128], which its kernels do not read.
        weight_scale: with an fp8 weight, [ceil(n / 128), k / 128] float32: one for each block of
            128 by 128. With the [n, k / 128] of FlashInfer's documentation, the kernels would read
            the first rows as block scales: docs/gemm.md.
        out: [m, n] bfloat16, written.
        workspace_buffer: uint8 scratch of `fp8_blockscale_gemm_workspace_size` bytes. By default
            each stream has scratch allocated by fi_ffi.

    The kernels clip a bfloat16 weight: docs/gemm.md. Raises `ArgumentError` and `ArgumentTypeError`
    before anything is launched, and `ArchitectureError` on GPUs other than Hopper.
    Upstream: flashinfer/gemm/gemm_base.py, csrc/fp8_blockscale_gemm_sm90_binding.cu.
    """
    _checked_gemm(input, weight, input_scale, weight_scale, out, workspace_buffer)(stream)


def _checked_gemm(
    input: TensorLike,
    weight: TensorLike,
    input_scale: TensorLike | None,
    weight_scale: TensorLike | None,
    out: TensorLike | None,
    workspace_buffer: TensorLike | None,
) -> Launch:
    """Check a product; return the function that launches it on a stream."""
    if input_scale is not None:
        input_scale = _with_all_columns(as_desc(input_scale, _BLOCK_SCALE, "input_scale"))
    values = (input, weight, out, input_scale, weight_scale)
    device = as_desc(input, _BLOCK_SCALE, "input").device
    descs, sizes = RUN_GEMM.check(*values)
    if not device.is_cuda:
        return lambda stream: RUN_GEMM.call(None, *descs.values(), stream=stream)
    m, n, depth = sizes["m"], sizes["n"], sizes["k128"]
    if not m:
        return lambda stream: None
    left, right = descs["input"], descs["weight"]
    own = None  # the caller's scratch
    if workspace_buffer is not None:
        own = as_desc(workspace_buffer, _BLOCK_SCALE, _ROOM.name)
        CONFIGURE.check(own)
        if own.device is not device:
            expected = f"{device}, the device of `input`"
            raise RUN_GEMM.refuse.error(_ROOM.name, own.device, expected)
        check_apart(RUN_GEMM.refuse, _ROOM.name, own, descs)

    def launch(stream: object) -> None:
        handle_for(stream, device, _BLOCK_SCALE)  # refuse a missing stream before loading
        check_available(rows.RUN_GEMM, device)
        with _lock:
            most = _announce(device, m, n, depth * _BLOCK)
            need = _bytes(most, left.dtype.name, right.dtype.name, n, depth * _BLOCK)
            memory = own
            if memory is None:
                memory = scratch_for(RUN_GEMM.refuse, _ROOM, device, need, stream, False)
            elif memory.numel < need:
                RUN_GEMM.refuse.scratch(_ROOM.name, memory.numel, need)
            CONFIGURE.call(None, memory, stream=stream)
            RUN_GEMM.call(None, *descs.values(), stream=stream)

    return launch


def _with_all_columns(scales: TensorDesc) -> TensorDesc:
    """View the first m columns of scales as all m4 columns, because the kernels read those too."""
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
    """Size in bytes of `workspace_buffer` for this `fp8_blockscale_gemm_sm90`.

    `m` is the most rows of any product in the process: the kernels lay the memory out for those.
    """
    op = "fp8_blockscale_gemm_workspace_size"
    for name, value in (("m", m), ("n", n), ("k", k)):
        check_int(op, name, value, 0, INT64_MAX)
    of_input = parse_dtype(input_dtype, op=op, argument="input_dtype").name
    of_weight = parse_dtype(weight_dtype, op=op, argument="weight_dtype").name
    return _bytes(round_up(m, 4), of_input, of_weight, n, k)


def _bytes(rows: int, of_input: str, of_weight: str, n: int, k: int) -> int:
    """Return the bytes that the object writes: fp8 values and their scales."""
    need, depth = _LEAST, -(-k // _BLOCK)
    if of_input not in E4M3:
        need += rows * (k + 4 * depth)
    if of_weight not in E4M3:
        need += n * k + 4 * -(-n // _BLOCK) * depth
    return need


# Block scales, SM100 and SM120.


def _granularity(op: str, value: Sequence[int]) -> tuple[int, ...]:
    """Return the rows, columns and depth of a block with one scale."""
    known = ((1, 128, 128), (128, 128, 128))
    if isinstance(value, (tuple, list)) and all(isinstance(size, Integral) for size in value):
        for sizes in known:
            if tuple(value) == sizes:
                return sizes
    expected = " or ".join(map(str, known))
    raise Refusal(op)("scale_granularity_mnk", value, expected)


def _groupwise(
    forms: dict[Row, CompiledRow], arguments: dict[str, Any]
) -> tuple[CompiledRow, list[Any]]:
    """Return the form for the GPU that `a` is on, and its arguments in order."""
    op = next(iter(forms)).name
    sizes = _granularity(op, arguments["scale_granularity_mnk"])
    a = as_desc(arguments["a"], op, "a")
    capability = None
    if a.device.is_cuda:
        # Without a GPU the call raises later, after the checks of its arguments.
        with contextlib.suppress(LoaderError):
            capability = machine.capability(a.device.index)
    row = form_on([*forms], capability)
    check_int(op, "mma_sm", arguments["mma_sm"], 1, 2)  # also where kernels do not take it
    granularity = {f"scale_granularity_{axis}": n for axis, n in zip("mnk", sizes, strict=True)}
    values = {**arguments, "a": a, **granularity}
    return forms[row], [values.get(_NAMES.get(arg.name, arg.name)) for arg in row.args]


def _prepare_groupwise(forms: dict[Row, CompiledRow], stream: object, **arguments: Any) -> Prepared:
    form, values = _groupwise(forms, arguments)
    return prepare_row(form, stream, *values)


@keyword_function(functools.partial(_prepare_groupwise, GROUPWISE))
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
    """Compute `out = (a * a_scale) @ (b * b_scale).T` with block scales, on SM100 and SM120.

    Args:
        a: [m, k] float8_e4m3fn or float8_e5m2; k is a multiple of 128, and m of 4 (SM100) or of gm
            (SM120).
        b: [n, k] of a's dtype; n is a multiple of 8 (SM100) or of 128 (SM120).
        a_scale: float32, one for each block of `a`: [m / gm, k / 128] in mode "K", [k / 128, m /
            gm] in mode "MN".
        b_scale: float32, one for each 128 by 128 block of `b`, in the same mode.
        scale_major_mode: "K" or "MN".
        mma_sm: 1, or 2 for products that two multiprocessors compute together, faster for many
            rows. SM120's kernels ignore it.
        scale_granularity_mnk: (gm, 128, 128), where gm is 1 or 128.
        out: [m, n] float16 or bfloat16, written.
        workspace_buffer: uint8 scratch, 32 MiB. By default each stream has scratch allocated by
            fi_ffi.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `ArchitectureError` on other GPUs.
    Upstream: flashinfer/gemm/gemm_base.py, csrc/gemm_groupwise_sm100.cu,
    csrc/gemm_groupwise_sm120.cu.
    """
    form, values = _groupwise(GROUPWISE, locals())
    form.call(None, *values, stream=stream)


@keyword_function(functools.partial(_prepare_groupwise, GROUP_GROUPWISE))
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
    """Compute `gemm_fp8_nt_groupwise` for groups of rows, each with its own matrix; SM100 and
    SM120.

    Args:
        a: [m, k], the groups one after another.
        b: [groups, n, k]; with several groups n is a multiple of 128. SM120 takes one group:
            FlashInfer reports wrong products for more.
        a_scale: as in `gemm_fp8_nt_groupwise`.
        b_scale: [groups, ...], for each group as in `gemm_fp8_nt_groupwise`.
        m_indptr: [groups + 1] int32 on the GPU: where each group's rows start, and the end;
            multiples of 4 and of gm, which are not checked.
        out: [m, n] float16 or bfloat16, written.
        others: as in `gemm_fp8_nt_groupwise`; scales of 128 rows must be in mode "K", unless m or k
            is at most 128 (docs/gemm.md).

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `ArchitectureError` on other GPUs.
    Upstream: flashinfer/gemm/gemm_base.py, csrc/group_gemm_fp8_groupwise_sm100.cu,
    csrc/group_gemm_fp8_groupwise_sm120.cu.
    """
    form, values = _groupwise(GROUP_GROUPWISE, locals())
    form.call(None, *values, stream=stream)
