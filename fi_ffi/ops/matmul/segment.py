"""`segment_gemm`: rows in segments, each times a matrix of its own.

The kernels are told of every segment by tables in device memory.  They are made on the host,
where the segments' lengths must be, and copied in order with the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.call.arguments import (
    check_choice,
    check_each,
    check_indptr,
    check_int_array,
)
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.launching import Launch, PreparedSteps, launching
from fi_ffi.ops.call.staging import Staged, staged
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.table.gemm import FP8

if TYPE_CHECKING:
    import numpy

    from fi_ffi.ops.call.arguments import Integers

_OP = "segment_gemm"
_BACKENDS = ("auto", "sm80", "sm90")
SM80, SM90 = (CompiledRow(row, op=_OP) for row in (rows.SEGMENT_SM80, rows.SEGMENT_SM90))
# The checks, by whether inputs are fp8, and whether weights are column-major.
_CHECKS = {key: CompiledRow(row, op=_OP) for key, row in rows.SEGMENTS.items()}
# What the SM90 kernels keep for each multiprocessor: the descriptors of two matrices, 128 bytes
# each, and as much again and more to spare.
_SCRATCH = 2048
# int64 of each segment: two for a problem's sizes, three addresses, and three strides.
_WORDS = 8


@dataclass(frozen=True)
class _CheckedCall:
    """A call's tensors and segments, checked."""

    x: TensorDesc
    weights: TensorDesc
    out: TensorDesc
    column_major: bool
    starts: Integers
    indices: Integers

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns of the output, and of the input."""
        return self.out.shape[1], self.x.shape[1]


def _refuse(argument: str, got: object, expected: str) -> ArgumentError:
    return ArgumentError(_OP, argument, got=got, expected=expected)


def _starts(seg_lens: Any, seg_indptr: Any, batch_size: Any, rows: int) -> Integers:
    """Where each segment starts, and the end."""
    import numpy as np

    if seg_indptr is not None:
        name, starts = "seg_indptr", check_indptr(_OP, "seg_indptr", seg_indptr)
    elif seg_lens is not None:
        name, lengths = "seg_lens", check_int_array(_OP, "seg_lens", seg_lens)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    else:
        raise _refuse("seg_indptr", None, "seg_indptr or seg_lens")
    if type(batch_size) is not int or batch_size != len(starts) - 1:
        expected = f"{len(starts) - 1}, as many segments as `{name}` has"
        raise _refuse("batch_size", batch_size, expected)
    if starts[-1] != rows:
        raise _refuse(name, f"{starts[-1]} rows in all", f"{rows}, the rows of `x`")
    return starts


def _indices(weight_indices: Any, segments: int, weights: int) -> Integers:
    """The matrix of each segment."""
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


def _checked(
    x: Any, weights: Any, out: Any, column_major: Any, segments: tuple[Any, Any, Any], chosen: Any
) -> _CheckedCall:
    left = as_desc(x, _OP, "x")
    if type(column_major) is not bool:
        raise _refuse("weight_column_major", column_major, "True or False")
    compiled = _CHECKS.get((left.dtype.name in FP8, column_major))
    if compiled is None:
        raise _refuse("weight_column_major", False, "True for fp8: there are no other kernels")
    descs, sizes = compiled.check(left, weights, out)
    tensors = descs["x"], descs["weights"], descs["out"]
    for name, desc in zip(descs, tensors, strict=True):
        if _row_stride(desc) < desc.shape[-1]:
            raise _refuse(name, f"strides {desc.strides}", "rows that do not overlap")
    starts = _starts(*segments, sizes["n"])
    indices = _indices(chosen, len(starts) - 1, sizes["num_weights"])
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
    """The tables of all segments that have rows, one after the other.

    The first has three int32 of each, and room for a fourth; the others one int64 of each.
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
    """The distance between rows of a matrix, in elements; of a single row, its length."""
    return desc.strides[-2] if desc.shape[-2] > 1 else desc.shape[-1]


def _prepare_segments(
    x: Any, weights: Any, out: Any, stream: object, **others: Any
) -> PreparedSteps:  # fmt: skip
    def check(**tensors: Any) -> Launch:
        return _checked_launch(**tensors, **others)

    return PreparedSteps(_OP, {"x": x, "weights": weights, "out": out}, check, stream)


@launching(_prepare_segments)
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
    """`out[i] = x[i] @ weights[i]` for rows in segments, each times a matrix of its own.

    Args:
        x: [rows, d_in] float16 or bfloat16, or fp8 (SM90, with column-major weights); all
            segments' rows one after another.  Rows may lie apart.
        weights: [num_weights, d_in, d_out], or column-major [num_weights, d_out, d_in].
        batch_size: how many segments there are.
        out: [rows, d_out] of x's dtype, of fp8 float16 or bfloat16; written.
        seg_lens, seg_indptr: the segments' lengths, or where they start, and the end: integers
            on the host (a list, an array), unlike FlashInfer's, which are on the GPU.  One of
            them is given; seg_indptr is taken where both are.
        weight_indices: which matrix is each segment's, on the host; the i-th is the i-th's
            without.
        backend: "sm90", "sm80" or "auto", which is "sm90" on Hopper and "sm80" elsewhere.

    d_out is a multiple of 8, and so is d_in (of fp8 of 16).  Nothing waits for the GPU.  A call
    that a graph captures keeps its tables for good: it computes the same segments each time.
    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/gemm/gemm_base.py (SegmentGEMMWrapper), csrc/group_gemm_sm90.cu,
    csrc/group_gemm.cu.
    """
    _checked_launch(
        x, weights, batch_size, weight_column_major, out, seg_lens, seg_indptr, weight_indices,
        backend,
    )(stream)  # fmt: skip


def _checked_launch(
    x: Any, weights: Any, batch_size: Any, weight_column_major: Any, out: Any, seg_lens: Any,
    seg_indptr: Any, weight_indices: Any, backend: Any,
) -> Launch:  # fmt: skip
    """A call that is checked, and what launches it on a stream."""
    segments = (seg_lens, seg_indptr, batch_size)
    call = _checked(x, weights, out, weight_column_major, segments, weight_indices)
    chosen, device = _backend(backend, call), call.x.device
    tables: list[numpy.ndarray[Any, Any]] = []

    def launch(stream: object) -> None:
        handle = handle_for(stream, device, _OP)  # a missing one is told first
        if not call.starts[-1]:
            return
        count = machine.multiprocessors(device.index) if device.is_cuda else 1
        if not tables:
            tables.append(_tables(call))
        with cuda.current(device), staged(
            device, handle, tables[0].data.cast("B"), _SCRATCH * count
        ) as place:  # fmt: skip
            if chosen == "sm80":
                _zero(call.out, handle)
            _launch(chosen, call, place, tables[0].shape[1], stream)

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
    """Clear the output, to which the SM80 kernels add."""
    rows, width = out.shape[0], out.shape[1] * out.dtype.itemsize
    pitch = out.strides[0] * out.dtype.itemsize if rows > 1 else width
    if out.device.is_cuda:
        cuda.clear(out.ptr, pitch, width, rows, stream)
        return
    for i in range(rows):
        ffi.memmove(cuda.pointer(out.ptr + i * pitch), bytes(width), width)
