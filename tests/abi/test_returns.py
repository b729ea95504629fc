"""What a kernel may return: every type index, objects of every type, and nonsense of each.

It is decoded, or refused before anything is read that is not there; abuse.c does as it is told.
"""

from __future__ import annotations

import gc
import random
import re
from typing import Any

import pytest

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, FrameLayout, global_function, make_array, probe
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import OBJECT_TYPES, Object
from fi_ffi.abi.tensor import parse_device
from fi_ffi.errors import AbiError, KernelError
from fi_ffi.modules.entry import Origin, adopted

from tests.abi.conftest import Abuse, cell

pytestmark = pytest.mark.usefixtures("heap")

PADDINGS = (0, 1, 0xDEADBEEF, 0xFFFFFFFF)
# A view, an rvalue reference, and indices that TVM-FFI keeps for later.
WITHOUT_FORM = [-(2**31), -2, -1, 10, *range(13, 64)]
OBJECTS = [*range(64, 80), 127, 128, 1000, 2**31 - 1]
POINTERS = [TypeIndex.DL_TENSOR_PTR, TypeIndex.RAW_STR, TypeIndex.BYTE_ARRAY_PTR, *OBJECTS]
ORIGIN = Origin("origin", None, False)


def refused(function: Any, *args: Any, match: str | None = None) -> None:
    with pytest.raises(AbiError, match=match and re.escape(match)):
        function(*args)


def address_of(memory: Any) -> int:
    return int(ffi.cast("uintptr_t", memory))


def test_indices_without_a_form_and_null_pointers(abuse: Abuse) -> None:
    for index in WITHOUT_FORM:
        refused(abuse.give, index, 7, 0x10, match=f"index {index} ")
    for index in POINTERS:
        refused(abuse.give, index, 0xDEADBEEF, 0, match="null pointer")


def test_plain_values_with_garbage_in_paddings(abuse: Abuse) -> None:
    give = abuse.give
    for padding in PADDINGS:
        assert give(TypeIndex.NONE, padding, 77) is None
        assert give(TypeIndex.INT, padding, -5) == -5
        assert give(TypeIndex.BOOL, padding, 0) is False
        assert give(TypeIndex.BOOL, padding, 256) is True
        assert give(TypeIndex.OPAQUE_PTR, padding, 0x1234) == 0x1234
        nan = give(TypeIndex.FLOAT, padding, 0x7FF8000000000001)
        assert nan != nan
        assert give(TypeIndex.DEVICE, padding, 2 | 3 << 32) is parse_device("cuda:3")
        assert repr(give(TypeIndex.DATA_TYPE, padding, 2 | 16 << 8 | 1 << 16)) == "float16"


def test_inline_strings(abuse: Abuse) -> None:
    raw = int.from_bytes(b"abcdefgh", "little")
    for size in range(9):
        assert abuse.give(TypeIndex.SMALL_STR, size, raw) == "abcdefgh"[:size]
        assert abuse.give(TypeIndex.SMALL_BYTES, size, raw) == b"abcdefgh"[:size]
    for size in (9, 255, 2**31, 2**32 - 1):
        for index in (TypeIndex.SMALL_STR, TypeIndex.SMALL_BYTES):
            refused(abuse.give, index, size, raw, match=f"{size} bytes")
    assert abuse.give(TypeIndex.SMALL_STR, 7, -1) == "\ufffd" * 7


def test_devices_and_dtypes(abuse: Abuse) -> None:
    for code, index in ((2, -1), (0, 0), (99, 0), (-1, 0), (10, 0), (1, -(2**31))):
        word = int(ffi.cast("int64_t", (code & 0xFFFFFFFF) | (index & 0xFFFFFFFF) << 32))
        refused(abuse.give, TypeIndex.DEVICE, 7, word, match="device")
    for word in (0, -1, 2 | 17 << 8 | 1 << 16, 5 | 64 << 8 | 1 << 16):
        refused(abuse.give, TypeIndex.DATA_TYPE, 7, word, match="dtype")


@pytest.mark.parametrize("index", OBJECTS)
def test_objects_of_every_index(index: int, abuse: Abuse) -> None:
    """Of a type that has a cell with pointers, all of them null."""
    with abuse.balanced():
        found = abuse.give_made(index, index, bytes(128))
        if index in (TypeIndex.STR, TypeIndex.BYTES):
            assert found == ("" if index == TypeIndex.STR else b"")
            return
        assert type(found) is OBJECT_TYPES.get(index, Object) and found.use_count == 1
        assert repr(found)
        if index == TypeIndex.TENSOR:  # of no dtype: it has no place to be called on
            refused(abuse.give_back, found, match="dtype")
        else:
            again = abuse.give_back(found)
            assert found.use_count == 2 and again.handle == found.handle
            again.release()
            assert found.use_count == 1
            del again
        del found


def test_objects_of_another_index_than_told(abuse: Abuse) -> None:
    for told in OBJECTS:
        for made in {0, -1, 63, 64, 71, 5000} - {told}:
            refused(abuse.give_made, told, made, bytes(128), match=f"its object of {made}")


def test_heap_strings(abuse: Abuse) -> None:
    give = abuse.give_made
    with abuse.balanced():
        for size in (0, 1, 7, 8, 1000, 2**20):
            memory = ffi.new("char[]", random.randbytes(size) + b"\xff\0\xc3")
            raw, whole = bytes(ffi.buffer(memory, size)), cell(address_of(memory), size)
            assert give(TypeIndex.STR, TypeIndex.STR, whole) == raw.decode(errors="replace")
            assert give(TypeIndex.BYTES, TypeIndex.BYTES, whole) == raw
        for index in (TypeIndex.STR, TypeIndex.BYTES):
            for size in (2**48 + 1, 2**63, 2**64 - 1):
                raw = cell(address_of(memory), size)
                refused(give, index, index, raw, match=f"{size} bytes")


# Shape, strides, number of dimensions, address, offset.
SILLY: dict[str, tuple[Any, ...]] = {
    "negative ndim": ((2, 3), None, -1, 0x1000, 0),
    "least ndim": ((2, 3), None, -(2**31), 0x1000, 0),
    "65 dimensions": ((1,) * 65, None, 65, 0x1000, 0),
    "two thousand million dimensions": ((2, 3), None, 2**31 - 1, 0x1000, 0),
    "no shape": (None, None, 2, 0x1000, 0),
    "negative size": ((2, -3), None, 2, 0x1000, 0),
    "past int64": ((2**62, 2**62), None, 2, 0x1000, 0),
    "strides past int64": ((2, 2), (2**62, 2**62), 2, 0x1000, 0),
    "past the end of memory": ((2**40,), None, 1, 2**64 - 16, 0),
    "an offset past the end": ((), None, 0, 0x1000, 2**64 - 1),
}


@pytest.mark.parametrize("name", SILLY)
def test_tensors_with_silly_fields(name: str, abuse: Abuse) -> None:
    made = ffi.new("DLTensor *")
    shape, strides, made.ndim, data, made.byte_offset = SILLY[name]
    made.data, made.device.device_type = ffi.cast("void *", data), 1
    made.dtype.code, made.dtype.bits, made.dtype.lanes = 2, 16, 1
    kept = [ffi.NULL if dims is None else ffi.new("int64_t[]", dims) for dims in (shape, strides)]
    made.shape, made.strides = kept
    refused(abuse.give, TypeIndex.DL_TENSOR_PTR, 9, address_of(made), match="DLTensor")
    with abuse.balanced():
        raw = bytes(ffi.buffer(made))
        tensor = abuse.give_made(TypeIndex.TENSOR, TypeIndex.TENSOR, raw)
        refused(adopted, tensor, ORIGIN, match="DLTensor")
        del tensor


def test_shapes(abuse: Abuse) -> None:
    words = ffi.new("int64_t[]", [1, -1, 2**63 - 1])

    def shape(*fields: int) -> Any:
        return adopted(abuse.give_made(TypeIndex.SHAPE, TypeIndex.SHAPE, cell(*fields)), ORIGIN)

    with abuse.balanced():
        assert shape(address_of(words), 3) == (1, -1, 2**63 - 1)
        assert shape(0, 0) == ()
        for at, size in ((0, 3), (address_of(words), 2**62), (address_of(words), 2**64 - 1)):
            refused(shape, at, size, match="ffi.Shape")


def test_a_repr_of_containers_nested_deep(abuse: Abuse) -> None:
    nested: Any = make_array([1])
    for _ in range(5000):
        nested = make_array([nested])
    found = adopted(abuse.give_back(nested), ORIGIN)
    with pytest.raises(RecursionError):
        repr(found)
    assert len(found) == 1


def test_a_frame_after_what_it_could_not_read(abuse: Abuse) -> None:
    """Neither taken for the next call's result, nor released twice."""
    layout = FrameLayout([None, None, None])
    give, fail = (Frame(layout, [int, int, int], entry) for entry in (abuse.give, abuse.fail))

    def call(frame: Frame, *numbers: int) -> Any:
        for i, number in enumerate(numbers):
            frame.words[layout.value(i)] = number
        return frame.call()

    for index in (10, TypeIndex.STR, TypeIndex.DATA_TYPE, TypeIndex.TENSOR):
        refused(call, give, index, -1, 0)
        assert give._result.type_index == TypeIndex.NONE
        assert call(give, TypeIndex.INT, 7, 9) == 9
        with pytest.raises(KernelError, match="left no error"):
            call(fail, -1, 0, 0)
        assert fail._result.type_index == TypeIndex.NONE


def test_a_failure_with_a_result(abuse: Abuse) -> None:
    """What an entry that fails has written is neither released nor the next call's result."""
    array, count = make_array([1, "two"]), global_function("ffi.ArraySize")
    for value in (array, 7, "a string of the heap", None):
        for _ in range(10):
            with pytest.raises(KernelError, match="with a result"):
                abuse.fail_holding(value)
            assert abuse.give(TypeIndex.INT, 0, 5) == 5
            assert abuse.give(TypeIndex.NONE, 0, 0) is None
            assert (count(array), array.use_count) == (2, 1)


def test_what_a_probe_is_answered(abuse: Abuse) -> None:
    """The function is given 512 of None: whatever it returns is no signature."""
    before = abuse.alive()
    for name in ("alive", "give", "give_made"):
        refused(probe, getattr(abuse, name))
    gc.collect()
    assert abuse.alive() - before <= 1  # `give_made`'s own, of index 0: no object is told
