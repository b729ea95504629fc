"""Device memory of functions of several steps: tables copied with a launch, zeros and counts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import address_of, renew_after_fork
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import Device, TensorDesc, frozen, parse_device
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.memory import HOST, keep, keep_for_graph, owned, stream_key
from fi_ffi.ops.call.refuse import Refusals, may_overlap
from fi_ffi.ops.call.staging import StagePool

_ALIGNMENT = 256
_LEAST = 1 << 14
_LEAST_NUMBERS = 1024


def copy_now(target: int, source: int, count: int, device: Device) -> None:
    """Copy from host memory and wait for the copy, which is allowed during a capture."""
    if not device.is_cuda:
        ffi.memmove(cuda.pointer(target), cuda.pointer(source), count)
        return
    with cuda.current(device), cuda.relaxed():
        cuda.copy_to_device(target, source, count, PER_THREAD)
        code = machine.load_cudart()[0].cudaStreamSynchronize(cuda.pointer(PER_THREAD))
        cuda.check(code, "cudaStreamSynchronize")


@dataclass(frozen=True)
class Staged:
    """The device addresses of a call's tables, and of the stream's scratch behind them."""

    address: int
    scratch: int
    scratch_bytes: int


class _StreamTables:
    """A stream's device memory for tables, which its calls use one after another."""

    def __init__(self, device: Device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.stages = StagePool(device, least=_LEAST)
        self.memory: cuda.Memory | None = None

    def room(self, count: int) -> int:
        """Return the address of this many bytes of device memory."""
        if self.memory is None or self.memory.desc.numel < count:
            if self.memory is not None:
                keep(self.memory)  # a kernel or a graph may still use it
            self.memory = cuda.allocate(max(2 * count, _LEAST), self.device)
        return self.memory.desc.ptr


_lock = threading.Lock()
renew_after_fork(globals(), "_lock", threading.Lock)


def _tables_of(device: Device, stream: int) -> _StreamTables:
    key = stream_key(device.index, stream) if device.is_cuda else HOST
    with _lock:
        mine = owned(key)
        found: _StreamTables = mine.get("tables") or mine.setdefault(
            "tables", _StreamTables(device)
        )
        return found


@contextmanager
def staged(device: Device, stream: int, table: memoryview, scratch_bytes: int) -> Iterator[Staged]:
    """Copy `table` to the device on a stream, for a kernel launched on it inside the block.

    The device is current. A call that is being captured gets memory of its own, which fi_ffi's
    graph holds; if another library captures, the memory is kept until the process ends.
    """
    is_captured = device.is_cuda and cuda.is_capturing(stream)
    tables = _StreamTables(device) if is_captured else _tables_of(device, stream)
    if is_captured and not keep_for_graph(tables):
        keep(tables)
    size = len(table)
    start = -(-size // _ALIGNMENT) * _ALIGNMENT
    # The lock keeps another thread's copy on this stream from coming between copy and launch.
    with tables.lock:
        stage, target = tables.stages.take(size), tables.room(start + scratch_bytes)
        source = stage.desc.ptr
        ffi.memmove(cuda.pointer(source), table, size)
        if device.is_cuda:
            cuda.copy_to_device(target, source, size, stream)
            if not is_captured:
                tables.stages.record(stage, stream)
        else:
            ffi.memmove(cuda.pointer(target), table, size)
        yield Staged(target, target + start, scratch_bytes)


def zero(
    address: int, width: int, device: Device, stream: int, rows: int = 1, pitch: int = 0
) -> None:
    """Queue the zeroing of `width` bytes in each of `rows` rows, which are `pitch` bytes apart; on
    the CPU, zero them at once."""
    if not device.is_cuda:
        for i in range(rows):
            ffi.memmove(cuda.pointer(address + i * pitch), bytes(width), width)
    elif width and rows:
        runtime, pointer = machine.load_cudart()[0], cuda.pointer
        code = runtime.cudaMemset2DAsync(
            pointer(address), pitch or width, 0, width, rows, pointer(stream)
        )
        cuda.check(code, "cudaMemset2DAsync")


def counting(device: Device, count: int, step: int = 1) -> TensorDesc:
    """Return `count` int32 numbers from 0 on, in steps of `step`, which kernels read in place of an
    absent tensor."""
    numbers = _numbers(device, max(1 << (count - 1).bit_length(), _LEAST_NUMBERS), step)
    return frozen(numbers.ptr, (count,), (1,), numbers.kind, numbers.owner)


@functools.cache
def _numbers(device: Device, count: int, step: int) -> TensorDesc:
    of = device if device.is_cuda else parse_device("cpu")
    memory = cuda.allocate(4 * count, of)
    numbers = ffi.new("int32_t[]", [i * step for i in range(count)])
    copy_now(memory.desc.ptr, address_of(numbers), 4 * count, of)
    return TensorDesc(memory.desc.ptr, (count,), "int32", device=of).at(memory.desc.ptr, memory)


def check_apart(
    refuse: Refusals, name: str, desc: TensorDesc, others: Mapping[str, TensorDesc | None]
) -> None:
    """Refuse written memory outside a row if it overlaps one of these tensors."""
    for other, beside in others.items():
        if desc.numel and beside is not None and beside.numel and may_overlap(desc, beside):
            raise refuse.error(name, refuse.overlaps(other, beside), "memory apart")
