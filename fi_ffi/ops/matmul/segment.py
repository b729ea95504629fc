"""`segment_gemm`: rows in segments, each times its own matrix.

The kernels read a table of the segments from device memory. The table is made on the host, where
the segments' lengths must be, and copied in order with the launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import Refusal, check_choice
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.on_host import check_each, check_indptr, check_int_array
from fi_ffi.ops.steps.keyword_call import Launch, PreparedSteps, keyword_function
from fi_ffi.ops.steps.memory import Staged, staged, zero
from fi_ffi.ops.table.gemm import FP8

if TYPE_CHECKING:
    import numpy

    from fi_ffi.ops.on_host import Integers

_OP = "segment_gemm"
_refuse = Refusal(_OP)
_BACKENDS = ("auto", "sm80", "sm90")
SM80, SM90 = (CompiledRow(row, op=_OP) for row in (rows.SEGMENT_SM80, rows.SEGMENT_SM90))
# The checks, by whether inputs are fp8 and whether weights are column-major.
_CHECKS = {key: CompiledRow(row, op=_OP) for key, row in rows.SEGMENTS.items()}
# Scratch of the SM90 kernels for each multiprocessor: descriptors of two matrices, 128 bytes each,
# with a wide margin.
_SCRATCH = 2048
# int64 words of each segment: two for the problem's sizes, three addresses, three strides.
_WORDS = 8


@dataclass(frozen=True)
class _CheckedCall:
    """A call's checked tensors and segments."""

    x: TensorDesc
    weights: TensorDesc
    out: TensorDesc
    column_major: bool
    starts: Integers
    indices: Integers

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the columns of the output and of the input."""
        return self.out.shape[1], self.x.shape[1]


def _starts(arguments: Mapping[str, Any], rows: int) -> Integers:
    """Return where each segment starts, and the end."""
    import numpy as np

    name = "seg_lens" if arguments["seg_indptr"] is None else "seg_indptr"
    if arguments[name] is None:
        raise _refuse("seg_indptr", None, "seg_indptr or seg_lens")
    if name == "seg_indptr":
        starts = check_indptr(_OP, name, arguments[name])
    else:
        lengths = check_int_array(_OP, name, arguments[name])
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    batch_size = arguments["batch_size"]
    if type(batch_size) is not int or batch_size != len(starts) - 1:
        expected = f"{len(starts) - 1}, as many segments as `{name}` has"
        raise _refuse("batch_size", batch_size, expected)
    if starts[-1] != rows:
        raise _refuse(name, f"{starts[-1]} rows in all", f"{rows}, the rows of `x`")
    return starts


def _indices(weight_indices: Any, segments: int, weights: int) -> Integers:
    """Return the matrix of each segment."""
    import numpy as np

    if weight_indices is None:
        if segments > weights:
            expected = f"one for each of {segments} segments, or weight_indices"
            raise _refuse("weights", f"{weights} matrices", expected)
        return np.arange(segments, dtype=np.int64)
    indices = check_int_array(_OP, "weight_indices", weight_indices)
    if len(indices) != segments:
        raise _refuse("weight_indices", f"{len(indices)} elements", f"{segments} elements")
    check_each(_OP, "weight_indices", indices, indices < weights, f"0 to {weights - 1}")
    return indices


def _checked(arguments: Mapping[str, Any]) -> _CheckedCall:
    left = as_desc(arguments["x"], _OP, "x")
    column_major = arguments["weight_column_major"]
    if type(column_major) is not bool:
        raise _refuse("weight_column_major", column_major, "True or False")
    compiled = _CHECKS.get((left.dtype.name in FP8, column_major))
    if compiled is None:
        raise _refuse("weight_column_major", False, "True for fp8: there are no other kernels")
    descs, sizes = compiled.check(left, arguments["weights"], arguments["out"])
    tensors = descs["x"], descs["weights"], descs["out"]
    for name, desc in zip(descs, tensors, strict=True):
        if _row_stride(desc) < desc.shape[-1]:
            raise _refuse(name, f"strides {desc.strides}", "rows that do not overlap")
    starts = _starts(arguments, sizes["n"])
    indices = _indices(arguments["weight_indices"], len(starts) - 1, sizes["num_weights"])
    return _CheckedCall(*tensors, column_major, starts, indices)


def _backend(backend: Any, call: _CheckedCall) -> str:
    backend = check_choice(_OP, "backend", backend, _BACKENDS)
    device, is_fp8 = call.x.device, call.x.dtype.name in FP8
    if backend == "auto":
        is_hopper = not device.is_cuda or machine.capability(device.index)[0] == 9
        backend = "sm90" if is_hopper or is_fp8 else "sm80"
    if backend == "sm80" and is_fp8:
        raise _refuse("backend", "'sm80'", f"'sm90' for {call.x.dtype}: sm80 has float16's")
    return str(backend)


def _tables(call: _CheckedCall) -> numpy.ndarray[Any, Any]:
    """Return the tables of all segments that have rows, one after the other.

    The first table has three int32 for each segment, padded to four; the others have one int64
    each.
    """
    import numpy as np

    (n, k), first = call.sizes, call.starts[:-1]
    lengths = np.diff(call.starts)
    there = lengths > 0
    lengths, first, indices = lengths[there], first[there], call.indices[there]
    count = len(lengths)
    table = np.zeros((_WORDS, count), np.int64)
    problems = table[:2].reshape(-1).view(np.int32)[: 3 * count].reshape(count, 3)
    problems[:, 0], problems[:, 1], problems[:, 2] = lengths, n, k
    for i, (desc, at) in enumerate(((call.x, first), (call.weights, indices), (call.out, first))):
        offsets = (at * (desc.strides[0] * desc.dtype.itemsize)).astype(np.uint64)
        table[2 + i] = (np.uint64(desc.ptr) + offsets).view(np.int64)
        table[5 + i] = _row_stride(desc)
    return table


def _row_stride(desc: TensorDesc) -> int:
    """Return the distance between rows of a matrix in elements; for a single row, its length."""
    return desc.strides[-2] if desc.shape[-2] > 1 else desc.shape[-1]


def _prepare_segments(
    x: Any, weights: Any, out: Any, stream: object, **others: Any
) -> PreparedSteps:
    def check(**tensors: Any) -> Launch:
        return _checked_launch({**tensors, **others})

    return PreparedSteps(_OP, {"x": x, "weights": weights, "out": out}, check, stream)


@keyword_function(_prepare_segments)
def segment_gemm(
    x: TensorLike,
    weights: TensorLike,
    batch_size: int,
    weight_column_major: bool,
    out: TensorLike,
    seg_lens: object = None,
    seg_indptr: object = None,
    weight_indices: object = None,
    *,
    backend: str = "auto",
    stream: object = None,
) -> None:
    """Compute `out[i] = x[i] @ weights[i]` for segments of rows, each with its own matrix.

    Args:
        x: [rows, d_in] float16 or bfloat16, or fp8 (SM90, with column-major weights): the rows of
            all segments, one after another. Rows may have a stride.
        weights: [num_weights, d_in, d_out], or column-major [num_weights, d_out, d_in].
        batch_size: number of segments.
        weight_column_major: whether weights are [num_weights, d_out, d_in].
        out: [rows, d_out] of x's dtype, for fp8 float16 or bfloat16; written.
        seg_lens: [batch_size] integers on the host (a list or an array): the segments' lengths.
        seg_indptr: [batch_size + 1] integers on the host: where segments start, and the end. One of
            the two is required; `seg_indptr` wins. FlashInfer's arrays are on the GPU.
        weight_indices: [batch_size] integers on the host: the matrix of each segment; by default
            matrix i for segment i.
        backend: "sm90", "sm80", or "auto": "sm90" on Hopper and "sm80" elsewhere.

    d_out is a multiple of 8, and d_in of 8 (fp8: of 16). The call does not wait for the GPU. If a
    graph captures the call, the graph keeps the tables and computes the same segments at each
    launch.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/gemm/gemm_base.py (SegmentGEMMWrapper), csrc/group_gemm_sm90.cu,
    csrc/group_gemm.cu.
    """
    _checked_launch(locals())(stream)


def _checked_launch(arguments: Mapping[str, Any]) -> Launch:
    """Check a call; return the function that launches it on a stream."""
    call = _checked(arguments)
    backend, device = _backend(arguments["backend"], call), call.x.device
    tables: list[numpy.ndarray[Any, Any]] = []

    def launch(stream: object) -> None:
        handle = handle_for(stream, device, _OP)  # refuse a missing stream before loading
        if not call.starts[-1]:
            return
        count = machine.multiprocessors(device.index) if device.is_cuda else 1
        if not tables:
            tables.append(_tables(call))
        with (
            cuda.current(device),
            staged(device, handle, tables[0].data.cast("B"), _SCRATCH * count) as place,
        ):
            if backend == "sm80":
                _zero(call.out, handle)
            _launch(backend, call, place, tables[0].shape[1], stream)

    return launch


def _launch(backend: str, call: _CheckedCall, place: Staged, count: int, stream: object) -> None:
    device = call.x.device

    def table(at: int, shape: tuple[int, ...], dtype: str) -> TensorDesc:
        return TensorDesc(place.address + at, shape, dtype, device=device)

    scratch = TensorDesc(place.scratch, (place.scratch_bytes,), "uint8", device=device)
    problems = table(0, (count, 3), "int32")
    of = [table(8 * count * i, (count,), "int64") for i in range(2, _WORDS)]
    like_x, like_out = (
        TensorDesc(desc.ptr, (0,), desc.dtype.name, device=device) for desc in (call.x, call.out)
    )
    tables, major = (problems, *of, like_x), call.column_major
    if backend == "sm80":
        SM80.call(None, scratch, *tables, major, stream=stream)
    else:
        SM90.call(None, scratch, scratch, *tables, like_out, major, stream=stream)


def _zero(out: TensorDesc, stream: int) -> None:
    """Zero the output, because the SM80 kernels add to it."""
    rows, width = out.shape[0], out.shape[1] * out.dtype.itemsize
    pitch = out.strides[0] * out.dtype.itemsize if rows > 1 else width
    zero(out.ptr, width, out.device, stream, rows, pitch)
