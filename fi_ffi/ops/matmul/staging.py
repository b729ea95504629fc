"""Tables that the host makes for a kernel, brought to the device in order with its launch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.ops import cuda

_ALIGNMENT = 256
_LEAST = 1 << 14
_MOST_STAGES = 4  # of a stream: a call that finds all in use waits for the oldest


@dataclass(frozen=True)
class Staged:
    """Where a call's tables lie on the device, and scratch of its stream behind them."""

    address: int
    scratch: int
    scratch_bytes: int


class _Stage:
    """Host memory that a copy reads, and an event for when it has."""

    __slots__ = ("done", "memory")

    def __init__(self, count: int, device: Device) -> None:
        self.memory = cuda.allocate_page_locked(count, device)
        self.done = cuda.Event() if device.is_cuda else None

    @property
    def room(self) -> int:
        return self.memory.desc.layout.numel

    def is_free(self) -> bool:
        return self.done is None or self.done.is_done()


class _Pool:
    """A stream's memory: calls on it follow one another, on the device."""

    def __init__(self, device: Device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.stages: list[_Stage] = []
        self.memory: cuda.Memory | None = None

    def stage(self, count: int) -> _Stage:
        """Host memory that no copy reads any more."""
        room = max(2 * count, _LEAST)
        for stage in self.stages:
            if stage.is_free():
                break
        else:
            if len(self.stages) < _MOST_STAGES:
                stage = _Stage(room, self.device)
                self.stages.append(stage)
            else:
                stage = self.stages[0]
                if stage.done is not None:
                    stage.done.wait()
        self.stages.remove(stage)
        if stage.room < count:
            stage = _Stage(room, self.device)
        self.stages.append(stage)
        return stage

    def room(self, count: int) -> cuda.Memory:
        """Device memory of so many bytes."""
        if self.memory is None or self.memory.desc.layout.numel < count:
            if self.memory is not None:
                _kept.append(self.memory)  # a kernel or a graph may still use it
            self.memory = cuda.allocate(max(2 * count, _LEAST), self.device)
        return self.memory


_lock = threading.Lock()
# By device and stream, for the life of the process: as in fi_ffi/ops/memory.py.
_pools: dict[tuple[Device, int], _Pool] = {}
# What streams have outgrown, and what captured graphs read each time they are launched.
_kept: list[object] = []


@contextmanager
def staged(device: Device, stream: int, table: memoryview, scratch_bytes: int) -> Iterator[Staged]:
    """Copy `table` to the device on a stream, for a kernel that is launched on it inside.

    A graph that is being captured gets memory of its own, which is kept for good.
    """
    with _lock:
        pool = _pools.setdefault((device, stream), _Pool(device))
    own = device.is_cuda and cuda.is_capturing(stream)
    if own:
        pool = _Pool(device)
        _kept.append(pool)
    size = len(table)
    start = -(-size // _ALIGNMENT) * _ALIGNMENT
    # Other threads may launch on the same stream: what is copied must be what is launched.
    with pool.lock:
        stage, room = pool.stage(size), pool.room(start + scratch_bytes)
        source, target = stage.memory.desc.ptr, room.desc.ptr
        ffi.memmove(cuda.pointer(source), table, size)
        if device.is_cuda:
            cuda.copy_to_device(target, source, size, stream)
            if stage.done is not None and not own:
                stage.done.record(stream)
        else:
            ffi.memmove(cuda.pointer(target), table, size)
        yield Staged(target, target + start, scratch_bytes)
