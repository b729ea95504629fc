"""The bytes of tensors, on the host."""

from __future__ import annotations

from collections.abc import Iterator

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops import cuda

_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost


def read(tensor: TensorDesc, stream: int | None) -> bytes:
    """A tensor's elements, row by row and next to each other.

    Of one on a GPU, as they are when the stream has done what was queued on it; its device is
    current.  Raises `KernelError` with CUDA's error code.
    """
    if not tensor.numel:
        return b""
    if tensor.is_contiguous:
        return _span(tensor.ptr, tensor.span_bytes, tensor.device, stream)
    steps = zip(tensor.strides, tensor.shape, strict=True)
    reach = sum(min(0, stride * (size - 1)) for stride, size in steps) * tensor.dtype.itemsize
    whole = memoryview(_span(tensor.ptr + reach, tensor.span_bytes, tensor.device, stream))
    count, starts = _pieces(tensor)
    return b"".join(whole[start - reach : start - reach + count] for start in starts)


def _pieces(tensor: TensorDesc) -> tuple[int, Iterator[int]]:
    """The bytes of each run of adjacent elements, and where these start."""
    item, run = tensor.dtype.itemsize, 1
    outer = list(zip(tensor.shape, tensor.strides, strict=True))
    while outer and (outer[-1][0] == 1 or outer[-1][1] == run):
        run *= outer.pop()[0]

    def starts(axes: list[tuple[int, int]], start: int) -> Iterator[int]:
        if not axes:
            yield start * item
            return
        (size, stride), *rest = axes
        for i in range(size):
            yield from starts(rest, start + i * stride)

    return run * item, starts(outer, 0)


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
        synchronize(stream or 0)
    return bytes(buffer)


def synchronize(stream: int) -> None:
    """Wait until a stream has done what was queued on it.  Raises `KernelError`."""
    event = cuda.Event()
    event.record(stream)
    event.wait()
