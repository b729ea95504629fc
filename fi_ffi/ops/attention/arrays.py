"""Index arrays of a plan: made on the host, kept in the int workspace after the schedule."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.ops.attention.indices import ints_layout
from fi_ffi.ops.attention.sizes import aligned

# Room comes in steps, so that a run's descriptors seldom change.
_INDEX_STEP, _KERNEL_STEP = 1024, 4096


class Arrays:
    """Index arrays behind the kernel's part of the int workspace."""

    def __init__(self, kernel_bytes: int) -> None:
        self.kernel_bytes = self.end = aligned(max(kernel_bytes, 1), _KERNEL_STEP)
        self._placed: dict[str, tuple[int, int]] = {}

    def place(self, name: str, room: int) -> None:
        """Set aside room for so many int32."""
        self._placed[name] = self.end, room
        self.end = aligned(self.end + 4 * room)

    def where(self, name: str) -> tuple[int, int]:
        """Where an array starts, in bytes, and its room in int32."""
        return self._placed[name]

    def holds(self, kernel_bytes: int, rooms: Mapping[str, int]) -> bool:
        """Whether it is what such a batch would be placed in, or has more for the kernel."""
        return kernel_bytes <= self.kernel_bytes and rooms == {
            name: room for name, (_, room) in self._placed.items()
        }

    def write(self, stage: memoryview, values: Mapping[str, memoryview]) -> None:
        """Write index arrays to their places in host memory, both as int32."""
        for name, view in values.items():
            start, room = self._placed[name]
            count = len(view)
            assert count <= room, f"{name}: {count} int32 in room for {room}"
            word = start // 4
            stage[word : word + count] = view

    def descs(self, buffer: TensorDesc) -> dict[str, TensorDesc]:
        return {
            name: make_desc(buffer.ptr + start, ints_layout(room, buffer.device))
            for name, (start, room) in self._placed.items()
        }


def placed_for(kernel_bytes: int, rooms: Mapping[str, int], before: Arrays) -> Arrays:
    """Places for index arrays of so many int32: those of the batch before, if they hold them."""
    if before.holds(kernel_bytes, rooms):
        return before
    placed = Arrays(kernel_bytes)
    for name, room in rooms.items():
        placed.place(name, room)
    return placed


def host_ints(values: Sequence[int]) -> memoryview:
    """An int32 array on the host, from Python's integers."""
    return memoryview(array("i", values))


def index_room(count: int) -> int:
    """Room for so many page indices, and some more."""
    return aligned(max(count, 1), _INDEX_STEP)
