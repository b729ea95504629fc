"""Page-locked memory that copies to a device read, and tables brought there with a launch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import renew_after_fork
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.ops import cuda
from fi_ffi.ops.call.memory import HOST, hold, keep, owned, stream_key

MOST_STAGES = 4
_ALIGNMENT = 256
_LEAST = 1 << 14


class Stage:
    """A piece of page-locked memory, and the event of the copy that reads it last."""

    __slots__ = ("desc", "done", "memory", "words")

    def __init__(self, desc: TensorDesc, device: Device, memory: cuda.Memory | None = None) -> None:
        self.desc, self.memory = desc, memory
        count = desc.numel // 4 * 4
        # The same memory as int32.
        view = memoryview(ffi.buffer(cuda.pointer(desc.ptr), count) if count else b"")
        self.words = view.cast("B").cast("i")
        with cuda.current(device):
            self.done = cuda.Event() if device.is_cuda else None

    @classmethod
    def allocate(cls, count: int, device: Device) -> Stage:
        memory = cuda.allocate_page_locked(count, device)
        return cls(memory.desc, device, memory)

    def is_free(self) -> bool:
        return self.done is None or self.done.is_done()


class StagePool:
    """Pieces of page-locked memory, each for one copy at a time, on whatever stream.

    It allocates `most` pieces at most, of `least` bytes at least; or it has the `pieces` that
    it is given, and allocates none.  Its owner locks it.
    """

    def __init__(
        self, device: Device, most: int = MOST_STAGES, least: int = 0,
        pieces: Sequence[TensorDesc] = (),
    ) -> None:  # fmt: skip
        self._device, self._least = device, least
        self._most = 0 if pieces else most
        # The one used last is the last, so that the first is always the oldest.
        self._stages = [Stage(piece, device) for piece in pieces]

    @property
    def last(self) -> Stage:
        """The piece that was used last."""
        return self._stages[-1]

    def take(self, count: int) -> Stage:
        """A piece of `count` bytes that no copy reads any more; waits for the oldest if need be."""
        stages = self._stages
        stage = next((one for one in stages if one.is_free()), None)
        if stage is None and len(stages) < self._most:
            stage = Stage.allocate(max(count, self._least), self._device)
            stages.append(stage)
        elif stage is None:
            stage = stages[0]
            assert stage.done is not None
            stage.done.wait()
        if stage.desc.numel < count:
            assert self._most, "a piece that was given is too small"
            larger = Stage.allocate(2 * count, self._device)
            self._put_last(larger, instead_of=stage)
            stage = larger
        return stage

    def _put_last(self, stage: Stage, *, instead_of: Stage) -> None:
        # In one assignment, so that an exception of a signal handler loses no piece.
        self._stages = [*(one for one in self._stages if one is not instead_of), stage]

    def record(self, stage: Stage, stream: int) -> None:
        """Copies from a piece were queued: it is free when the stream has done them."""
        self._put_last(stage, instead_of=stage)
        if stage.done is not None:
            stage.done.record(stream)


@dataclass(frozen=True)
class Staged:
    """Where a call's tables lie on the device, and scratch of its stream behind them."""

    address: int
    scratch: int
    scratch_bytes: int


class _StreamTables:
    """A stream's memory for tables: calls on it follow one another, on the device."""

    def __init__(self, device: Device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.stages = StagePool(device, least=_LEAST)
        self.memory: cuda.Memory | None = None

    def room(self, count: int) -> int:
        """The address of device memory of so many bytes."""
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
    """Copy `table` to the device on a stream, for a kernel that is launched on it inside.

    The device is current.  A graph that is being captured gets memory of its own, which it
    holds, or which is kept for good where another library records it.
    """
    is_captured = device.is_cuda and cuda.is_capturing(stream)
    tables = _StreamTables(device) if is_captured else _tables_of(device, stream)
    if is_captured and not hold(tables):
        keep(tables)
    size = len(table)
    start = -(-size // _ALIGNMENT) * _ALIGNMENT
    # Other threads may launch on the same stream: what is copied must be what is launched.
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
