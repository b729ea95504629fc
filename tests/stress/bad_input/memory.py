"""The memory of a call: everything it is given lies in one room, random bytes around each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

import fi_ffi

_GUARD = 256  # also what each tensor's address is a multiple of


def _reach(shape: tuple[int, ...], steps: Iterable[int], itemsize: int) -> int:
    """Bytes from a tensor's address to past its end; 0 where it has no elements."""
    if 0 in shape:
        return 0
    return itemsize + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))


class Room:
    """Copies of arrays, and what every byte of the room must be."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._at: dict[str, int] = {}
        end = _GUARD
        for name, array in arrays.items():
            self._at[name] = end
            size = _reach(array.shape, array.strides, array.itemsize)
            end += -(-size // _GUARD) * _GUARD + _GUARD
        room = np.random.default_rng().integers(0, 256, end + _GUARD, np.uint8)
        self.whole = room[-room.ctypes.data % _GUARD :][:end]
        self.base = self.whole.ctypes.data
        self.arrays = {
            name: np.ndarray(a.shape, a.dtype, self.whole.data, self._at[name], a.strides)
            for name, a in arrays.items()
        }
        for name, array in arrays.items():
            self.arrays[name][...] = array
        self.before = self.whole.copy()

    def descs(self) -> dict[str, fi_ffi.TensorDesc]:
        return {name: fi_ffi.as_desc(array) for name, array in self.arrays.items()}

    def holds(self, desc: fi_ffi.TensorDesc) -> bool:
        """Whether all that a descriptor tells of is memory of the room."""
        return desc.device.type == "cpu" and self.has(desc)

    def has(self, desc: fi_ffi.TensorDesc) -> bool:
        """The same of addresses alone."""
        if not desc.numel:
            return True
        itemsize = desc.dtype.itemsize
        both = zip(desc.shape, desc.strides, strict=True)
        steps = [(n - 1) * stride * itemsize for n, stride in both]
        first = desc.ptr + sum(step for step in steps if step < 0)
        last = desc.ptr + sum(step for step in steps if step > 0) + itemsize
        return self.base <= first and last <= self.base + len(self.whole)

    def view(self, desc: fi_ffi.TensorDesc, *, before: bool = False) -> np.ndarray:
        """The elements of a descriptor that the room holds, now or as they were."""
        dtype = desc.dtype.numpy
        if not desc.numel:
            return np.zeros(desc.shape, dtype)
        buffer = self.before if before else self.whole
        steps = [stride * dtype.itemsize for stride in desc.strides]
        return np.ndarray(desc.shape, dtype, buffer.data, desc.ptr - self.base, steps)

    def is_untouched(self) -> bool:
        return bool(np.array_equal(self.whole, self.before))

    def changed_outside(self, descs: Iterable[fi_ffi.TensorDesc]) -> int:
        """How many bytes differ that are not elements of any of these."""
        differs = self.whole != self.before
        if differs.any():
            for desc in descs:
                if desc.numel:
                    size = desc.dtype.itemsize
                    steps = [*(stride * size for stride in desc.strides), 1]
                    at = desc.ptr - self.base
                    np.ndarray((*desc.shape, size), bool, differs.data, at, steps)[...] = False
        return int(differs.sum())

    def restore(self) -> None:
        self.whole[...] = self.before
