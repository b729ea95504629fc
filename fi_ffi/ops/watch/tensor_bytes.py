"""The elements of tensors, on the host: their bytes, and statistics of them."""

from __future__ import annotations

import itertools
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device, DType, TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops import cuda

MOST_BYTES = 2**28  # of a tensor whose statistics are made
_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost
# The dtypes that numpy has by itself, and how the names of more of them begin.
_OF_NUMPY = {"float16", "float32", "float64", "bool"}
_INTEGERS = ("int", "uint")


def read(tensor: TensorDesc, stream: int | None) -> bytes:
    """Read a tensor's elements, row by row and next to each other.

    Of one on a GPU, as they are when the stream has done what was queued on it; its device is
    current.  Raises `KernelError` with CUDA's error code.
    """
    if not tensor.numel:
        return b""
    if tensor.is_contiguous:
        return _span(tensor.ptr, tensor.span_bytes, tensor.device, stream)
    item, axes = tensor.dtype.itemsize, list(zip(tensor.shape, tensor.strides, strict=True))
    first = sum(min(0, stride * (size - 1)) for size, stride in axes) * item
    span = memoryview(_span(tensor.ptr + first, tensor.span_bytes, tensor.device, stream))
    run = 1  # of elements that lie next to each other
    while axes and (axes[-1][0] == 1 or axes[-1][1] == run):
        run *= axes.pop()[0]
    offsets = (range(0, stride * size, stride) if stride else [0] * size for size, stride in axes)
    starts = (sum(steps) * item - first for steps in itertools.product(*offsets))
    return b"".join(span[start : start + run * item] for start in starts)


def _span(address: int, count: int, device: Device, stream: int | None) -> bytes:
    if not device.is_cuda:
        return bytes(ffi.buffer(cuda.pointer(address), count))
    buffer = bytearray(count)
    with cuda.relaxed():
        target = ffi.from_buffer(buffer)
        code = machine.load_cudart()[0].cudaMemcpyAsync(
            target, cuda.pointer(address), count, _DEVICE_TO_HOST, cuda.pointer(stream or 0)
        )
        cuda.check(code, "cudaMemcpyAsync")
        done = cuda.Event()
        done.record(stream or 0)
        done.wait()
    return bytes(buffer)


def statistics(tensor: TensorDesc, stream: int | None) -> str:
    """Describe the elements: min, max and mean of the finite ones, and how many are NaN and
    infinite; or why that is not done.  Imports numpy.

    Raises `KernelError` where the tensor cannot be read.
    """
    if not tensor.numel:
        return "no elements"
    if tensor.dtype.lanes > 1:
        return f"no statistics of {tensor.dtype}: elements share bytes"
    if tensor.span_bytes > MOST_BYTES:
        return f"no statistics: {tensor.span_bytes} bytes, more than {MOST_BYTES}"
    dtype = _numpy_dtype(tensor.dtype)
    if dtype is None:
        return f"no statistics of {tensor.dtype}: ml_dtypes is not installed"
    return _statistics_of(read(tensor, stream), dtype)


def _numpy_dtype(dtype: DType) -> Any:
    """The dtype as numpy has it; None where that needs what is not installed."""
    import numpy

    if dtype.name in _OF_NUMPY or dtype.name.startswith(_INTEGERS):
        return numpy.dtype(dtype.name)
    try:
        return dtype.numpy
    except ImportError:
        return None


def _statistics_of(data: bytes, dtype: Any) -> str:
    import numpy as np

    values = np.frombuffer(data, dtype)
    if dtype.kind in "iub":
        mean = values.mean(dtype="float64")
        return f"min {int(values.min())}, max {int(values.max())}, mean {mean:.6g}"
    wide = values if dtype.itemsize > 2 else values.astype(np.float32)
    nan, infinite = np.isnan(wide), np.isinf(wide)
    counts = f"{int(nan.sum())} NaN, {int(infinite.sum())} Inf"
    finite = wide[~(nan | infinite)]
    if not finite.size:
        return f"no finite element, {counts}"
    mean = finite.mean(dtype="float64")
    return f"min {finite.min():.6g}, max {finite.max():.6g}, mean {mean:.6g}, {counts}"
