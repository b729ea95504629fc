"""Index arrays of a plan: made on the host, kept in the int workspace after the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.ops import cuda
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

    def write(self, stage: TensorDesc, values: Mapping[str, TensorDesc]) -> None:
        for name, desc in values.items():
            start, room = self._placed[name]
            assert desc.shape[0] <= room, f"{name}: {desc.shape[0]} int32 in room for {room}"
            target = cuda.pointer(stage.ptr + start)
            ffi.memmove(target, cuda.pointer(desc.ptr), 4 * desc.shape[0])

    def descs(self, buffer: TensorDesc) -> dict[str, TensorDesc]:
        return {
            name: make_desc(buffer.ptr + start, ints_layout(room, buffer.device))
            for name, (start, room) in self._placed.items()
        }


def host_ints(values: Sequence[int]) -> TensorDesc:
    """An int32 array on the host, from Python's integers."""
    memory = ffi.new("int32_t[]", list(values))
    return make_desc(int(ffi.cast("uintptr_t", memory)), ints_layout(len(values)), owner=memory)


def index_room(count: int) -> int:
    """Room for so many page indices, and some more."""
    return aligned(max(count, 1), _INDEX_STEP)
