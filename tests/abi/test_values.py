"""Values into a TVM-FFI function and back, through C++ and through Python callbacks."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi.function import Entry, array_values, make_array
from fi_ffi.abi.tensor import DTYPES, TensorDesc, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelError

from tests.helpers.ids import shown

pytestmark = pytest.mark.usefixtures("heap")

SCALARS = [None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 1e-300, math.inf, math.nan]
# 7 bytes are kept inline, 8 on the heap.
TEXTS = ["", "a", "1234567", "12345678", "naïve", "€€€", "😀", "a\0b", "\0", "12345678\0", "\0" * 9]
TEXTS += ["x" * 2**20, "é\0" * 2**19]
DTYPE_VALUES = list(DTYPES.values())
BLOBS = [text.encode() for text in TEXTS] + [b"\xff\xfe", bytes(range(256))]
VALUES = [*SCALARS, *TEXTS, *BLOBS, *DTYPE_VALUES]


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if type(left) is float:
        return math.copysign(1, left) == math.copysign(1, right) and (
            left == right or (math.isnan(left) and math.isnan(right))
        )
    return bool(left == right)


def test_round_trips(echo: Entry, callback: Callable[..., Entry]) -> None:
    """A result of a callback is made for the call, and owned by who called."""
    seen: list[object] = []
    identity = callback(lambda value: (seen.append(value), value)[1])
    for value in VALUES:
        assert same(echo(value), value) and same(identity(value), value), shown(value)
        assert same(seen.pop(), value), shown(value)
        with make_array([value, value]) as array:
            assert all(same(element, value) for element in array_values(array)), shown(value)
        made = callback(lambda value=value: make_array([value, 1]), 0)()
        assert made.use_count == 1 and same(array_values(made)[0], value)


REFUSED = {
    2**63: "int64",
    -(2**63) - 1: "int64",
    2**64: "int64",
    -(10**5000): "int64",
}
REFUSED |= dict.fromkeys(("\ud800", "12345678\udfff", "\0\ud800"), "surrogate")


def test_values_past_what_a_type_holds(echo: Entry, callback: Callable[..., Entry]) -> None:
    for value, words in REFUSED.items():
        with pytest.raises(ArgumentError, match=words) as caught:
            echo(value)
        assert (caught.value.op, caught.value.argument) == ("testing.echo", "0")
        with pytest.raises(KernelError, match=f"ArgumentError: .*`result`.*{words}"):
            callback(lambda value=value: value, 0)()


class Colour(enum.IntEnum):
    RED = 1


class Name(str, enum.Enum):
    NHD = "nhd"


MEANING = [(np.int64(1), 1), (np.float32(1), 1.0), (np.True_, True), (Colour.RED, 1)]
MEANING += [(type("Sly", (str,), {"encode": None})("text"), "text")]
MEANING += [(Name.NHD, "nhd"), (bytearray(b"x"), b"x"), (memoryview(b"x"), b"x")]


@pytest.mark.parametrize(("value", "expected"), MEANING, ids=shown)
def test_values_of_the_same_meaning(value: object, expected: object, echo: Entry) -> None:
    assert same(echo(value), expected)


# What `fi_ffi.modules` packs is refused here too.
WITHOUT_FORM = [object(), int, 1j, iter([1]), [1], {"a": 1}, parse_device("cpu"), len]


@pytest.mark.parametrize("value", WITHOUT_FORM, ids=shown)
def test_values_without_a_form(value: object, echo: Entry, callback: Callable[..., Entry]) -> None:
    with pytest.raises(ArgumentTypeError, match="testing.echo: argument `1`: got"):
        echo(None, value)
    with pytest.raises(KernelError, match="ArgumentTypeError: .*`result"):
        callback(lambda: value, 0)()


DESCS = [
    TensorDesc(0x1000, (2, 3), "bfloat16", device="cuda:1"),
    TensorDesc(0x1000, (2, 3), "float16", strides=(7, 2), device="cpu"),
    TensorDesc(0x1000, (3,), "uint8", strides=(-2,), device="cpu"),
    TensorDesc(0x1000, (), "float4_e2m1fn_x2"),
    TensorDesc(0, (0, 5), "int64"),
    TensorDesc(2**47, (2**31, 2**20, 3), "int8", strides=(1, 2, 2**31 + 1), device="cpu"),
    TensorDesc(2**31, (2**30 - 1, 2), "float16", strides=(2**32, 2**31)),
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
    # Without an owner it would name memory that may be gone when the caller looks.
    with pytest.raises(KernelError, match=r"ArgumentTypeError: .*`result.*an owner"):
        callback(lambda _: desc)(desc)
