"""Values into a TVM-FFI function and back, through C++ and through Python callbacks."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, array_values, global_function, make_array
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.tensor import DEVICE_TYPES, DTYPES, Device, TensorDesc, parse_device
from fi_ffi.abi.values import unpack
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, KernelError

from tests.helpers.ids import shown

SCALARS = [None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 1e-300, math.inf, math.nan]
# 7 bytes are kept inline, 8 on the heap.
TEXTS = ["", "a", "1234567", "12345678", "naïve", "€€€", "😀", "a\0b", "\0", "12345678\0", "\0" * 9]
TEXTS += ["x" * 2**20, "é\0" * 2**19]
BLOBS = [text.encode() for text in TEXTS] + [b"\xff\xfe", bytes(range(256))]
DTYPE_VALUES = list(DTYPES.values())
DEVICES = [parse_device(name) for name in DEVICE_TYPES] + [parse_device("cuda:7")]
VALUES = [*SCALARS, *TEXTS, *BLOBS, *DTYPE_VALUES, *DEVICES]


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if type(left) is float:
        return math.copysign(1, left) == math.copysign(1, right) and (
            left == right or (math.isnan(left) and math.isnan(right))
        )
    return bool(left == right)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_round_trips(value: object, echo: Entry, callback: Callable[..., Entry]) -> None:
    seen: list[object] = []

    def identity(argument: object) -> object:
        seen.append(argument)
        return argument

    for function in (echo, callback(identity)):
        assert same(function(value), value)
    assert same(seen[0], value)
    with make_array([value, [], value][::2]) as array:
        assert all(same(element, value) for element in array_values(array))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.sampled_from(DTYPE_VALUES),
    st.sampled_from(DEVICES),
)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nested_arrays(value: Any) -> None:
    def packed(value: Any) -> Any:
        return make_array([packed(element) for element in value]) if type(value) is list else value

    def check(found: Any, value: Any) -> None:
        if type(value) is not list:
            assert same(found, value)
            return
        elements = array_values(found)
        assert len(elements) == len(value)
        for pair in zip(elements, value, strict=True):
            check(*pair)

    check(global_function("testing.echo")(packed(value)) if value else packed(value), value)


def test_typed_functions_of_the_library_take_them(testing_library: object) -> None:
    for name, value in {
        "int": 5,
        "float": 2.5,
        "bool": True,
        "string": "a\0b and more",
        "bytes": b"\0\xff",
        "dtype": DTYPES["bfloat16"],
        "device": parse_device("cuda:3"),
        "opt_int": None,
        "opt_str": "x",
    }.items():
        assert same(global_function(f"testing.schema_id_{name}")(value), value), name
    with make_array(["a", "b\0"]) as array:
        found = global_function("testing.schema_id_arr_str")(array)
        assert array_values(found) == ["a", "b\0"]


def test_the_library_refuses_other_types_in_its_own_words(testing_library: object) -> None:
    with pytest.raises(KernelError, match="TypeError: Mismatched type .* Expected `int` but got"):
        global_function("testing.schema_id_int")("5")


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, 2**64, pytest.param(-(10**5000), id="huge")]
)
def test_ints_past_int64(value: int, echo: Entry) -> None:
    with pytest.raises(ArgumentError, match="int64") as caught:
        echo(value)
    assert caught.value.op == "testing.echo"
    assert caught.value.argument == "0"


@pytest.mark.parametrize("text", ["\ud800", "12345678\udfff", "\0\ud800"])
def test_text_that_is_no_unicode(text: str, echo: Entry) -> None:
    with pytest.raises(ArgumentError, match="surrogate"):
        echo(text)


class Colour(enum.IntEnum):
    RED = 1


class Name(str, enum.Enum):
    NHD = "nhd"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(1), 1),
        (np.float32(1), 1.0),
        (np.True_, True),
        (Colour.RED, 1),
        (Name.NHD, "nhd"),
        (bytearray(b"x"), b"x"),
    ],
    ids=shown,
)
def test_values_of_the_same_meaning(value: object, expected: object, echo: Entry) -> None:
    assert same(echo(value), expected)


@pytest.mark.parametrize(
    "value", [object(), int, {1, 2}, 1j, iter([1]), itertools.count(), [1, [object()]]], ids=shown
)
def test_values_without_a_form(value: object, echo: Entry) -> None:
    with pytest.raises(ArgumentTypeError, match=r"testing.echo: argument `1(\[1\]\[0\])?`: got"):
        echo(None, value)


def test_text_that_is_not_utf8_is_still_told(echo: Entry) -> None:
    """A C++ string may hold anything; what is no UTF-8 comes as the replacement character."""
    for raw in (b"\xff", b"\xff" * 8):
        array, _buffer = library.byte_array(raw)
        slot = ffi.new("TVMFFIAny *")
        assert library.lib.TVMFFIStringFromByteArray(array, slot) == 0
        assert unpack(slot, owned=True) == "\ufffd" * len(raw)


@pytest.mark.parametrize("index", [10, 13, 63, -1])
def test_type_indices_without_a_form(index: int) -> None:
    slot = ffi.new("TVMFFIAny *", {"type_index": index})
    with pytest.raises(AbiError, match=str(index)):
        unpack(slot, owned=False)


def test_dtypes_and_devices_that_are_not_ours() -> None:
    slot = ffi.new("TVMFFIAny *", {"type_index": TypeIndex.DATA_TYPE})
    slot.v_dtype.code, slot.v_dtype.bits, slot.v_dtype.lanes = 5, 64, 1
    with pytest.raises(AbiError, match="5:64:1"):
        unpack(slot, owned=True)
    slot = ffi.new("TVMFFIAny *", {"type_index": TypeIndex.DEVICE})
    slot.v_device.device_type = 10
    with pytest.raises(AbiError, match="10"):
        unpack(slot, owned=True)


def test_an_opaque_pointer_is_its_address() -> None:
    slot = ffi.new("TVMFFIAny *", {"type_index": TypeIndex.OPAQUE_PTR})
    slot.v_ptr = ffi.cast("void *", 0xDEAD)
    assert unpack(slot, owned=True) == 0xDEAD


DESCS = [
    TensorDesc(0x1000, (2, 3), "bfloat16", device="cuda:1"),
    TensorDesc(0x1000, (2, 3), "float16", strides=(7, 2), device="cpu"),
    TensorDesc(0x1000, (3,), "uint8", strides=(-2,), device="cpu"),
    TensorDesc(0x1000, (), "float4_e2m1fn_x2"),
    TensorDesc(0, (0, 5), "int64"),
    TensorDesc(2**64 - 100, (1,) * 64, "float8_e4m3fn", device="cuda_managed"),
]


@pytest.mark.parametrize("desc", DESCS, ids=str)
def test_tensors_are_seen_as_they_are(
    desc: TensorDesc, echo: Entry, callback: Callable[..., Entry]
) -> None:
    seen: list[TensorDesc] = []
    callback(seen.append)(desc)
    with echo(desc) as tensor:  # an object: what is kept of it is safe
        assert repr(tensor.described()) == repr(seen[0]) == repr(desc)


def test_a_view_is_no_result(callback: Callable[..., Entry]) -> None:
    """It would name memory that is gone when the caller looks."""
    with pytest.raises(KernelError, match="ArgumentTypeError: .*`result`"):
        callback(lambda desc: desc)(DESCS[0])


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", {1, 2}], ids=shown)
def test_results_without_a_form(value: object, callback: Callable[..., Entry]) -> None:
    with pytest.raises(KernelError, match="Argument.*Error: .*`result`"):
        callback(lambda: value, 0)()


def test_results_outlive_the_call(callback: Callable[..., Entry]) -> None:
    """What a callback returns is made for the call and must be owned by its result."""
    for number in range(200):
        text = f"{number} " * 100
        assert callback(lambda: text, 0)() == text  # noqa: B023
        assert callback(lambda: text.encode(), 0)() == text.encode()  # noqa: B023
        array = callback(lambda: make_array([text, 1]), 0)()  # noqa: B023
        assert array.use_count == 1
        assert array_values(array) == [text, 1]


def test_a_device_made_by_hand_goes_through(echo: Entry) -> None:
    assert echo(Device("cuda", 3)) is parse_device("cuda:3")
