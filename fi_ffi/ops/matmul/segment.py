"""`segment_gemm`: rows in segments, each times a matrix of its own.

The kernels are told of every segment by tables in device memory.  They are made on the host,
where the segments' lengths must be, and copied in order with the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError, printed
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.check import check_layouts
from fi_ffi.ops.gemm import FP8
from fi_ffi.ops.host import all_at, indptr, integers
from fi_ffi.ops.matmul.entries import SEGMENT_SM80, SEGMENT_SM90, as_called
from fi_ffi.ops.matmul.rows import SEGMENTS
from fi_ffi.ops.matmul.staging import Staged, staged
from fi_ffi.ops.memory import check_apart
from fi_ffi.ops.settled import on
from fi_ffi.ops.values import check_address

if TYPE_CHECKING:
    import numpy

    from fi_ffi.ops.host import Integers

_OP = "segment_gemm"
_BACKENDS = ("auto", "sm80", "sm90")
# What the SM90 kernels keep for each multiprocessor: the descriptors of two matrices, 128 bytes
# each, and as much again and more to spare.
_SCRATCH = 2048
# int64 of each segment: two for a problem's sizes, three addresses, and three strides.
_WORDS = 8


@dataclass(frozen=True)
class _Call:
    """A call that was checked."""

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
        name, starts = "seg_indptr", indptr(_OP, "seg_indptr", seg_indptr)
    elif seg_lens is not None:
        name, lengths = "seg_lens", integers(_OP, "seg_lens", seg_lens)
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
    indices = integers(_OP, "weight_indices", weight_indices)
    if len(indices) != segments:
        raise _refuse("weight_indices", f"{len(indices)} elements", f"{segments} elements")
    all_at(_OP, "weight_indices", indices, indices < weights, f"0 to {weights - 1}")
    return indices


def _checked(
    x: Any, weights: Any, out: Any, column_major: Any, segments: tuple[Any, Any, Any], chosen: Any
) -> _Call:
    named = (("x", x), ("weights", weights), ("out", out))
    descs = [as_desc(given, _OP, name) for name, given in named]
    if type(column_major) is not bool:
        raise _refuse("weight_column_major", column_major, "True or False")
    row = SEGMENTS.get((descs[0].dtype.name in FP8, column_major))
    if row is None:
        raise _refuse("weight_column_major", False, "True for fp8: there are no other kernels")
    checked = check_layouts(row, [desc.layout for desc in descs])
    for tensor, desc, alignment in zip(row.tensors, descs, checked.alignments, strict=True):
        check_address(_OP, tensor, desc, alignment)
        if _row_stride(desc) < desc.shape[-1]:
            raise _refuse(tensor.name, f"strides {desc.strides}", "rows that do not overlap")
    check_apart(row, descs)
    sizes = checked.sizes
    starts = _starts(*segments, sizes["n"])
    indices = _indices(chosen, len(starts) - 1, sizes["num_weights"])
    return _Call(descs[0], descs[1], descs[2], column_major, starts, indices)


def _backend(backend: Any, call: _Call) -> str:
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise _refuse("backend", printed(backend), " or ".join(map(repr, _BACKENDS)))
    device, is_fp8 = call.x.device, call.x.dtype.name in FP8
    if backend == "auto":
        is_hopper = not device.is_cuda or machine.capability(device.index)[0] == 9
        backend = "sm90" if is_hopper or is_fp8 else "sm80"
    if backend == "sm80" and is_fp8:
        raise _refuse("backend", "'sm80'", f"'sm90' for {call.x.dtype}: sm80 has float16's")
    return str(backend)


def _tables(call: _Call) -> numpy.ndarray[Any, Any]:
    """What the kernels are told of every segment that has rows, a table after the other.

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
    """How far rows of a matrix lie apart; of one row, what the kernels take."""
    return desc.strides[-2] if desc.shape[-2] > 1 else desc.shape[-1]


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
    segments = (seg_lens, seg_indptr, batch_size)
    call = _checked(x, weights, out, weight_column_major, segments, weight_indices)
    chosen, device = _backend(backend, call), call.x.device
    on_stream = on(stream, device, _OP)  # a missing one is told first
    if not call.starts[-1]:
        return
    count = machine.multiprocessors(device.index) if device.is_cuda else 1
    handle = 0 if on_stream is None else on_stream.handle
    tables = _tables(call)
    with cuda.current(device), as_called(_OP, {}), staged(
        device, handle, tables.data.cast("B"), _SCRATCH * count
    ) as place:  # fmt: skip
        if chosen == "sm80":
            _zero(call.out, handle)
        _launch(chosen, call, place, tables.shape[1], stream)


def _launch(backend: str, call: _Call, place: Staged, count: int, stream: object) -> None:
    device = call.x.device

    def table(at: int, shape: tuple[int, ...], dtype: str) -> TensorDesc:
        return make_desc(place.address + at, make_layout(shape, dtype, None, device, False))

    scratch = make_desc(
        place.scratch, make_layout((place.scratch_bytes,), "uint8", None, device, False)
    )
    problems = table(0, (count, 3), "int32")
    of = [table(8 * count * i, (count,), "int64") for i in range(2, _WORDS)]
    like_x, like_out = (
        make_desc(desc.ptr, make_layout((0,), desc.dtype.name, None, device, False))
        for desc in (call.x, call.out)
    )
    if backend == "sm80":
        SEGMENT_SM80(scratch, problems, *of, like_x, call.column_major, stream=stream)
    else:
        SEGMENT_SM90(
            scratch, scratch, problems, *of, like_x, like_out, call.column_major, stream=stream
        )


def _zero(out: TensorDesc, stream: int) -> None:
    """Clear the output, to which the SM80 kernels add."""
    rows, width = out.shape[0], out.shape[1] * out.dtype.itemsize
    pitch = out.strides[0] * out.dtype.itemsize if rows > 1 else width
    if out.device.is_cuda:
        cuda.clear(out.ptr, pitch, width, rows, stream)
        return
    for i in range(rows):
        ffi.memmove(cuda.pointer(out.ptr + i * pitch), bytes(width), width)
