"""Reads tensors' elements to the host, and describes them by statistics."""

from __future__ import annotations

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda

MAX_BYTES = 2**28  # the largest tensor for which statistics are computed
_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost


def read(tensor: TensorDesc, stream: int | None) -> bytes:
    """Read a tensor's elements, row by row without gaps.

    A tensor on a GPU is read after the stream's work so far; its device is current. Raises
    `KernelError` with CUDA's error code.
    """
    if not tensor.numel:
        return b""
    if tensor.is_contiguous:
        return _span(tensor.ptr, tensor.span_bytes, tensor.device, stream)
    import numpy

    item = tensor.dtype.itemsize
    strides = [stride * item for stride in tensor.strides]
    steps = zip(strides, tensor.shape, strict=True)
    first = sum(min(0, stride * (size - 1)) for stride, size in steps)
    span = _span(tensor.ptr + first, tensor.span_bytes, tensor.device, stream)
    elements: bytes = numpy.ndarray(tensor.shape, f"V{item}", span, -first, strides).tobytes()
    return elements


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
    """Describe the elements: min, max and mean of the finite ones, and the numbers of NaN and
    infinities; or the reason why that is impossible.

    Imports numpy. Raises `KernelError` if the tensor cannot be read.
    """
    if not tensor.numel:
        return "no elements"
    if tensor.dtype.lanes > 1 or tensor.dtype.shares_bytes:
        return f"no statistics of {tensor.dtype}: elements share bytes"
    if tensor.span_bytes > MAX_BYTES:
        return f"no statistics: {tensor.span_bytes} bytes, more than {MAX_BYTES}"
    import numpy as np

    values = np.frombuffer(read(tensor, stream), tensor.dtype.numpy)
    if values.dtype.kind in "iub":
        mean = values.mean(dtype="float64")
        return f"min {int(values.min())}, max {int(values.max())}, mean {mean:.6g}"
    wide = values if values.itemsize > 2 else values.astype(np.float32)
    nan, infinite = np.isnan(wide), np.isinf(wide)
    counts = f"{int(nan.sum())} NaN, {int(infinite.sum())} Inf"
    finite = wide[~(nan | infinite)]
    if not finite.size:
        return f"no finite element, {counts}"
    mean = finite.mean(dtype="float64")
    return f"min {finite.min():.6g}, max {finite.max():.6g}, mean {mean:.6g}, {counts}"
