"""Arrays that calls are given: of `quant_scales`, and of tactics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import make_array
from fi_ffi.abi.objects import Array, Tensor
from fi_ffi.abi.tensor import TensorDesc, make_desc

_CACHE_LIMIT = 1024


def _address(array: Array) -> int:
    return int(ffi.cast("uintptr_t", array.handle))


class TensorArray:
    """An Array of Tensor objects over memory of somebody else's, which it does not keep."""

    __slots__ = ("_tensors", "address", "array")

    def __init__(self, descs: Sequence[TensorDesc]) -> None:
        self._tensors = [Tensor.from_desc(make_desc(desc.ptr, desc.layout)) for desc in descs]
        self.array = make_array(self._tensors)
        self.address = _address(self.array)

    def __del__(self) -> None:
        # The array first: a tensor that somebody refers to keeps its header for ever.
        if hasattr(self, "array"):
            self.array.release()
        for tensor in getattr(self, "_tensors", ()):
            tensor.release()


class TensorArrays:
    """Those made for earlier calls: the scales of a layer's weights are the same in each."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], TensorArray] = {}

    def of(self, descs: Sequence[TensorDesc]) -> TensorArray:
        key: tuple[object, ...] = tuple((desc.ptr, desc.layout) for desc in descs)
        found = self._made.get(key)
        if found is None:
            found = TensorArray(descs)
            if len(self._made) >= _CACHE_LIMIT:
                self._made.clear()  # one in use elsewhere lives on there
            self._made[key] = found
        return found


@functools.cache
def pair(first: int, second: int) -> tuple[Any, int]:
    """An Array of two ints, and its address."""
    array = make_array([first, second])
    return array, _address(array)
