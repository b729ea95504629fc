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

_CELLS = 1024  # cells in a page, 4 bytes each
_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostAllocPortable | cudaHostAllocMapped
_MASK = 2**32 - 1


class ProgressCell:
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
    """The cells of all streams.

    `allocate` returns the address of memory that streams can write to. `write(stream, address,
    number)` queues a write. Both raise their errors. Memory is never freed, because freeing might
    wait for a stream that hangs.
    """

    def __init__(
        self, allocate: Callable[[int], int], write: Callable[[int, int, int], None]
    ) -> None:
        self._allocate, self._write = allocate, write
        self._lock = threading.RLock()
        self._cells: dict[StreamKey, ProgressCell] = {}
        self._free: list[ProgressCell] = []

    def cell(self, key: StreamKey) -> ProgressCell:
        """Return the cell of a stream."""
        cell = self._cells.get(key)
        if cell is not None:
            return cell
        with self._lock:
            if key not in self._cells:
                if not self._free:
                    self._free_finished()
                if not self._free:
                    self._add_page()
                cell = self._free.pop()
                cell.key = key
                self._cells[key] = cell
            return self._cells[key]

    def mark(self, cell: ProgressCell, key: StreamKey, stream: int) -> tuple[ProgressCell, int]:
        """Queue the stream's next number after its work so far; return the cell and the number.

        `cell` is the result of `cell(key)`; a new one replaces it if it was freed meanwhile.
        """
        while True:
            with cell.lock:
                if cell.key == key:
                    number = (cell.issued + 1) & _MASK
                    self._write(stream, cell.address, number)
                    cell.issued = number
                    return cell, number
            cell = self.cell(key)

    def _free_finished(self) -> None:
        """Free the cells of streams that have written all their numbers; most of those streams are
        gone."""
        for key, cell in list(self._cells.items()):
            if cell.lock.acquire(blocking=False):
                try:
                    if cell.value == cell.issued:
                        del self._cells[key]
                        cell.key = None
                        self._free.append(cell)
                finally:
                    cell.lock.release()

    def _add_page(self) -> None:
        size = 4 * _CELLS
        address = self._allocate(size)
        memory = ffi.buffer(cuda.pointer(address), size)
        memory[:] = bytes(size)
        page = memoryview(memory).cast("B").cast("I")
        self._free += [ProgressCell(page, i, address + 4 * i) for i in reversed(range(_CELLS))]


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
