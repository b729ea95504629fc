"""Page-locked memory for copies to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.ops.call import cuda

MAX_STAGES = 4


class Stage:
    """A piece of page-locked memory, and the event of the last copy from it."""

    __slots__ = ("desc", "done", "memory", "ptr", "size", "words")

    def __init__(self, desc: TensorDesc, device: Device, memory: cuda.Memory | None = None) -> None:
        self.desc, self.memory, self.ptr, self.size = desc, memory, desc.ptr, desc.numel
        count = self.size // 4 * 4
        # The same memory as int32.
        view = memoryview(ffi.buffer(cuda.pointer(desc.ptr), count) if count else b"")
        self.words = view.cast("B").cast("i")
        with cuda.current(device):
            self.done = cuda.Event() if device.is_cuda else None

    @classmethod
    def allocate(cls, count: int, device: Device) -> Stage:
        memory = cuda.allocate_page_locked(count, device)
        return cls(memory.desc, device, memory)


class StagePool:
    """Pieces of page-locked memory, each for one copy at a time, on any stream.

    It allocates up to `MAX_STAGES` pieces of at least `least` bytes, or uses the given `pieces` and
    allocates none. The piece that was used last is used again, if it is free: it is in the
    processor's caches. Its owner locks it.
    """

    def __init__(self, device: Device, least: int = 0, pieces: Sequence[TensorDesc] = ()) -> None:
        self._device, self._least = device, least
        self._most = 0 if pieces else MAX_STAGES
        # Ordered by last use: the first is the oldest.
        self._stages = [Stage(piece, device) for piece in pieces]

    @property
    def last(self) -> Stage:
        """The piece that was used last."""
        return self._stages[-1]

    def take(self, count: int) -> Stage:
        """Return a piece of `count` bytes that no copy reads any more; wait for the oldest if
        needed."""
        stages = self._stages
        for stage in stages[-1:] + stages:
            if stage.done is None or stage.done.is_done():
                break
        else:
            if len(stages) < self._most:
                stage = Stage.allocate(max(count, self._least), self._device)
                stages.append(stage)
            else:
                stage = stages[0]
                assert stage.done is not None
                stage.done.wait()
        if stage.size < count:
            assert self._most, "a piece that was given is too small"
            larger = Stage.allocate(2 * count, self._device)
            self._put_last(larger, instead_of=stage)
            stage = larger
        return stage

    def _put_last(self, stage: Stage, *, instead_of: Stage) -> None:
        # One assignment, so that a signal handler's exception loses no piece.
        if self._stages[-1] is not stage:
            self._stages = [*[one for one in self._stages if one is not instead_of], stage]

    def record(self, stage: Stage, stream: Any) -> None:
        """Record that copies from a piece were queued: it is free when the stream has done them."""
        self._put_last(stage, instead_of=stage)
        if stage.done is not None:
            stage.done.record(stream)
