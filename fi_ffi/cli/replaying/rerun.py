"""Dumped calls made again: on a GPU, or by the reference on the CPU.

Tensors are placed as they lay: those that overlapped do so again, at addresses as aligned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import array_values
from fi_ffi.abi.objects import Array as ArrayObject
from fi_ffi.abi.tensor import Device, TensorDesc, make_desc, parse_device
from fi_ffi.cli.replaying.recorded import Recorded, RecordedTensor
from fi_ffi.errors import FiFfiError
from fi_ffi.ops import cuda
from fi_ffi.ops.attention.workspace import FLOAT_BYTES, INT_BYTES
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.row import PlanInfo, Row, Tensor
from fi_ffi.reference.arrays import Array

POISON = 0xFF  # every byte of what a call only writes, before it
_CPU = parse_device("cpu")
_ALIGNMENT = 256  # of which addresses keep the rest
_DEFAULT_STREAM = 0
# POD attention has a plan's arguments beside those of a single request.
_OF_DECODE = "_d"
# Scratch memory on a GPU is at least this, for what was enough on one device may not be on another.
_LEAST = {"float_workspace_buffer": FLOAT_BYTES, "tmp": 2**26, "tmp_p": 2**26}
_LEAST_OF_INTS = INT_BYTES  # of the int workspace, and of the host memory before it
_MOST = 2**30  # of what a dump asks for
_ON_CPU = 2**20  # where the reference uses none
_OF_PLANS = ("float_workspace_buffer", "int_workspace_buffer")


class CannotReplay(FiFfiError, ValueError):
    """A dumped call lacks what it would need to be made again."""


@dataclass(frozen=True)
class Rerun:
    """What a call gave this time."""

    # What was written.
    after: dict[str, Array]
    result: Any


def rerun(recorded: Recorded, device: Device) -> Rerun:
    """Make a dumped call again on a device.

    Raises `CannotReplay`, and what the call itself would.
    """
    row = _row(recorded)
    scratch: dict[str, TensorDesc] = {}
    info = None
    if any(isinstance(arg, PlanInfo) for arg in row.args):
        if recorded.plan is None:
            raise CannotReplay(
                f"{recorded.path}: it was planned before the log was open, so that nothing is "
                "known of the plan; open the log before planning"
            )
        planning = _Calling(recorded.plan, device, scratch)
        info = planning.make(None)
    calling = _Calling(recorded, device, scratch)
    result = calling.make(info)
    written = [name for name, of in recorded.tensors.items() if of.writes and not of.is_scratch]
    after = calling.placed.get(written)
    return Rerun(after, array_values(result) if isinstance(result, ArrayObject) else result)


def _row(recorded: Recorded) -> Row:
    if recorded.row is None:
        raise CannotReplay(
            f"{recorded.path}: no row describes {recorded.document.get('entry')}, so that it is "
            "not known what it writes; its tensors can be read from the file"
        )
    return recorded.row


class _Calling:
    """One call, its tensors placed; calls of one plan share the scratch memory."""

    def __init__(self, recorded: Recorded, device: Device, scratch: dict[str, TensorDesc]) -> None:
        self._recorded, self._device, self._scratch = recorded, device, scratch
        self._row = _row(recorded)
        self._args = {arg.name: arg for arg in self._row.tensors}
        if not recorded.tensors.keys() <= self._args.keys():
            unknown = ", ".join(recorded.tensors.keys() - self._args.keys())
            raise CannotReplay(f"{recorded.path}: {self._row.name} has no {unknown}")
        kept = [of for of in recorded.tensors.values() if not of.is_scratch]
        for of in kept:
            if of.elements is None:
                raise CannotReplay(f"{recorded.path}: the elements of {of.name} are not in it")
        on_host = {name for name, arg in self._args.items() if arg.host}
        self.placed = Placed(kept, device, on_host)

    def make(self, info: ArrayObject | None) -> Any:
        """Make the call; what it returns."""
        values = [self._value(arg, info) for arg in self._row.given]
        compiled = CompiledRow(self._row, self._recorded.module or None)
        stream = _DEFAULT_STREAM if self._device.is_cuda else None
        return compiled.call(None, *values, stream=stream)

    def _value(self, arg: Any, info: ArrayObject | None) -> Any:
        if isinstance(arg, PlanInfo):
            assert info is not None
            return int(ffi.cast("uintptr_t", info.handle))
        of = self._recorded.tensors.get(arg.name)
        if of is None:
            return self._recorded.values.get(arg.name)
        if not of.is_scratch:
            return self.placed.desc(arg.name)
        # Of its own kind of scratch memory an op brings what this device needs.
        return None if arg.is_scratch else self._workspace(arg, of.span)

    def _workspace(self, arg: Tensor, count: int) -> TensorDesc:
        # As its plan calls it, of whose kernel this is a part.
        name = arg.name.removesuffix(_OF_DECODE)
        if name not in self._scratch:
            if self._recorded.plan is not None and name in _OF_PLANS:
                raise CannotReplay(f"{self._recorded.path}: its plan has no {name}")
            if count > _MOST:
                raise CannotReplay(
                    f"{self._recorded.path}: {name} has {count} bytes, and {_MOST} is the most"
                )
            size = max(count, _LEAST.get(name, _LEAST_OF_INTS))
            where = _CPU if arg.host else self._device
            memory = cuda.allocate(size if self._device.is_cuda else _ON_CPU, where, zeroed=True)
            self._scratch[name] = memory.desc.at(memory.desc.ptr, memory)
        return self._scratch[name]


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
    """Tensors on a device, those in `on_host` on the host; what is only written is poison."""

    def __init__(
        self, tensors: Iterable[RecordedTensor], device: Device, on_host: Collection[str] = ()
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


def kernel_of(recorded: Recorded, device: Device) -> str:
    """What is called now, and whether that is the file that was called then."""
    if not device.is_cuda:
        return "the reference on the CPU"
    from fi_ffi.loader import runtime

    loaded = runtime.load(recorded.module, device.index)
    then = recorded.document.get("sha256")
    same = "the same file" if then == loaded.file.sha256 else f"another file than {then}"
    return f"{recorded.module} of {loaded.source.location}, {same}"
