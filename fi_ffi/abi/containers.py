"""Containers, made and read through the functions that libtvm_ffi has for them."""

from __future__ import annotations

import functools
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check
from fi_ffi.abi.function import Entry, global_function
from fi_ffi.abi.objects import OBJECT_TYPES, Object


@functools.cache
def function_of(name: str) -> Entry:
    """A function of libtvm_ffi's own, looked up once: it has them as long as it is loaded."""
    return global_function(name)


def make(maker: str, packed: Any, count: int) -> Object:
    """The object that a maker such as `ffi.Array` returns for packed values."""
    entry, result = function_of(maker), ffi.new("TVMFFIAny *")
    check(entry.address(entry.handle, packed, count, result), maker)
    return OBJECT_TYPES.get(result.type_index, Object)(result.v_ptr)
