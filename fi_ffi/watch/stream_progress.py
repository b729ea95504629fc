"""Tracks the progress of streams: each stream writes increasing numbers to host memory.

The watchdog reads the progress from that memory, without calling CUDA.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.memory import StreamKey

_SLOTS = 1024  # slots in a page, 4 bytes each
_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostAllocPortable | cudaHostAllocMapped
_MASK = 2**32 - 1


class Slot:
    """The memory to which one stream writes its numbers, and the last number issued."""

    __slots__ = ("_index", "_page", "address", "issued", "key", "lock")

    def __init__(self, page: Any, index: int, address: int) -> None:
        self._page, self._index, self.address = page, index, address
        self.issued = 0
        self.key: StreamKey | None = None
        # Held while a number is issued, so that numbers are queued in order. Reentrant for signal
        # handlers that launch: they repeat the number that was about to be issued.
        self.lock = threading.RLock()

    @property
    def value(self) -> int:
        """The last number that the stream wrote."""
        return int(self._page[self._index])

    def until(self, number: int) -> int:
        """Return how many more numbers the stream writes until this one; 0 if it was written.

        Numbers wrap around; two numbers in use are never 2**31 apart.
        """
        ahead = (number - self.value) & _MASK
        return ahead if ahead < 2**31 else 0


class StreamProgress:
    """The slots of all streams.

    `allocate` returns the address of memory that streams can write to. `write(stream, address,
    number)` queues a write. Both raise their errors. Memory is never freed, because freeing might
    wait for a stream that hangs.
    """

    def __init__(
        self, allocate: Callable[[int], int], write: Callable[[int, int, int], None]
    ) -> None:
        self._allocate, self._write = allocate, write
        self._lock = threading.RLock()
        self._slots: dict[StreamKey, Slot] = {}
        self._free: list[Slot] = []

    def slot(self, key: StreamKey) -> Slot:
        """Return the slot of a stream."""
        slot = self._slots.get(key)
        if slot is not None:
            return slot
        with self._lock:
            if key not in self._slots:
                if not self._free:
                    self._free_finished()
                if not self._free:
                    self._add_page()
                slot = self._free.pop()
                slot.key = key
                self._slots[key] = slot
            return self._slots[key]

    def mark(self, slot: Slot, key: StreamKey, stream: int) -> tuple[Slot, int]:
        """Queue the stream's next number after its work so far; return the slot and the number.

        `slot` is the result of `slot(key)`; a new one replaces it if it was freed meanwhile.
        """
        while True:
            with slot.lock:
                if slot.key == key:
                    number = (slot.issued + 1) & _MASK
                    self._write(stream, slot.address, number)
                    slot.issued = number
                    return slot, number
            slot = self.slot(key)

    def _free_finished(self) -> None:
        """Free the slots of streams that have written all their numbers; most of those streams are
        gone."""
        for key, slot in list(self._slots.items()):
            if slot.lock.acquire(blocking=False):
                try:
                    if slot.value == slot.issued:
                        del self._slots[key]
                        slot.key = None
                        self._free.append(slot)
                finally:
                    slot.lock.release()

    def _add_page(self) -> None:
        size = 4 * _SLOTS
        address = self._allocate(size)
        memory = ffi.buffer(cuda.pointer(address), size)
        memory[:] = bytes(size)
        page = memoryview(memory).cast("B").cast("I")
        self._free += [Slot(page, i, address + 4 * i) for i in reversed(range(_SLOTS))]


def _driver() -> Any:
    driver = machine.load_driver()
    if driver is None:
        raise LoaderError(f"{machine.DRIVER}, which a watchdog needs, does not load")
    return driver


def _write(stream: int, address: int, number: int) -> None:
    code = _driver().cuStreamWriteValue32_v2(cuda.pointer(stream), address, number, 0)
    cuda.check(code, "cuStreamWriteValue32")


def _allocate(count: int) -> int:
    """Allocate page-locked memory, which devices see at the host's address."""
    runtime, address = machine.load_cudart()[0], ffi.new("void **")
    with cuda.relaxed():
        code = runtime.cudaHostAlloc(address, count, _PORTABLE_AND_MAPPED)
    cuda.check(code, f"cudaHostAlloc of {count} bytes")
    return int(ffi.cast("uintptr_t", address[0]))


progress = StreamProgress(_allocate, _write)


def _forget() -> None:
    """Start afresh in a forked child, which must not touch the parent's memory, and whose copied
    locks may be held."""
    global progress
    progress = StreamProgress(_allocate, _write)


os.register_at_fork(after_in_child=_forget)
