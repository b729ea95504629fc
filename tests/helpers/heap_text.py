"""Strings that libtvm_ffi keeps on its heap: objects, unlike short ones."""

from __future__ import annotations

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.objects import String


def heap_string(text: str = "long enough for the heap") -> String:
    array, _buffer = library.byte_array(text.encode())
    value = ffi.new("TVMFFIAny *")
    assert library.lib.TVMFFIStringFromByteArray(array, value) == 0
    assert value.type_index == String.type_index
    return String(value.v_ptr)
