"""Memory for the tensors of a call that is made again, as they lay in the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device, TensorDesc, make_desc, parse_device
from fi_ffi.cli.replaying.recorded import RecordedTensor
from fi_ffi.ops import cuda
from fi_ffi.reference.arrays import Array

POISON = 0xFF
_CPU = parse_device("cpu")
_ALIGNMENT = 256  # of which addresses keep the rest


class _Region:
    """Adjacent bytes on a device, and their copy on the host."""

    def __init__(self, start: int, count: int, device: Device) -> None:
        self.start, self.device = start, device
        self.memory = cuda.allocate(count + 2 * _ALIGNMENT, device)
        base = self.memory.desc.ptr
        self.address = base + (start - base) % _ALIGNMENT
        self.host = np.full(count, POISON, np.uint8)

    def view(self, tensor: RecordedTensor) -> Array:
        """The tensor in the copy on the host."""
        dtype = tensor.dtype.numpy
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        offset = tensor.address - self.start
        view: Array = np.ndarray(tensor.shape, dtype, self.host.data, offset, strides)
        return view

    def copy(self, to_host: bool) -> None:
        """Copy all of it between the device and the host."""
        ends = (self.host.ctypes.data, self.address)
        target, source = ends if to_host else ends[::-1]
        if not self.host.size:
            return
        if not self.device.is_cuda:
            ffi.memmove(cuda.pointer(target), cuda.pointer(source), self.host.size)
            return
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        kinds = runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyDeviceToHost if to_host else kinds.cudaMemcpyHostToDevice
        check(runtime.cudaDeviceSynchronize())
        check(runtime.cudaMemcpy(target, source, self.host.size, kind))
        check(runtime.cudaDeviceSynchronize())


class Placed:
    """Tensors on a device: those that overlapped do so again, at addresses as aligned.

    What a call only writes is poison before.
    """

    def __init__(
        self, tensors: Iterable[RecordedTensor], device: Device, on_host: frozenset[str]
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._on_host, self._device = on_host, device
        self._regions: dict[str, _Region] = {}
        for group in _groups(self._tensors.values()):
            self._place(group)

    def _place(self, group: list[RecordedTensor]) -> None:
        start = min(tensor.address for tensor in group)
        end = max(tensor.address + tensor.span for tensor in group)
        where = _CPU if group[0].name in self._on_host else self._device
        region = _Region(start, end - start, where)
        for tensor in group:
            self._regions[tensor.name] = region
            if tensor.elements is not None and tensor.reads:
                region.view(tensor)[...] = tensor.elements
        region.copy(to_host=False)

    def desc(self, name: str) -> TensorDesc:
        region, tensor = self._regions[name], self._tensors[name]
        address = region.address + tensor.address - region.start
        return make_desc(
            address, tensor.shape, tensor.dtype, tensor.strides, region.device, owner=region
        )

    def get(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of tensors as they are now; waits for the device."""
        found: dict[str, Array] = {}
        for name in names:
            region = self._regions[name]
            region.copy(to_host=True)
            found[name] = region.view(self._tensors[name]).copy()
        return found


def _groups(tensors: Iterable[RecordedTensor]) -> Iterator[list[RecordedTensor]]:
    """Tensors that share memory, together."""
    group: list[RecordedTensor] = []
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.address):
        if not tensor.span:
            yield [tensor]
            continue
        if group and tensor.address >= end:
            yield group
            group = []
        end = max(end, tensor.address + tensor.span) if group else tensor.address + tensor.span
        group.append(tensor)
    if group:
        yield group
