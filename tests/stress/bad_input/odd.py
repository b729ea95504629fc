"""Values that are no argument of anything, and numbers that are no number for a kernel."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import fi_ffi


class _BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class _BadExporter:
    """Its protocols raise."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise BufferError("not now")

    def __dlpack__(self, **_: Any) -> object:
        raise BufferError("not now")


class _Capsule:
    """Says it is on the CPU and gives what is no capsule."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> object:
        return object()


class _Device(_Capsule):
    """On a device of a kind that nobody knows."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (99, -1)


# What of a good interface is something else; `...` is not there.  The bytes of a buffer, which
# numpy's protocol allows, would be taken for an address.
INTERFACES: list[dict[str, Any]] = [
    *({"data": data} for data in (
        ..., None, 0, (0,), (-1, False), (2**64, False), (4096.5, False), ("0x40", False),
        b"\x10\x20", bytearray(64), np.zeros(2), [0x1000, False],
    )),
    *({"typestr": text} for text in (
        ..., None, 7, "", "f", "<f", "<fx", "<f3", "<V2", "<f" + "9" * 5000, ">f4",
    )),
    *({"shape": shape} for shape in (
        ..., 3, "abc", (-1,), (2.0,), (2**70,), (2**40, 2**40), (1,) * 100, itertools.count(),
    )),
    *({"strides": strides} for strides in (
        3, ("a", "b"), ("4", 4), (2,), (1, 1), (4, 4, 4), (2**63, 2),
    )),
]  # fmt: skip


class Interface:
    """An array by numpy's protocol, of anything."""

    def __init__(self, **fields: Any) -> None:
        whole = {"shape": (2, 2), "typestr": "<f2", "data": (4096, False), "version": 3}
        self._fields = {k: v for k, v in (whole | fields).items() if v is not ...}

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._fields


class _Index:
    def __index__(self) -> int:
        return 3


class _Float:
    def __float__(self) -> float:
        return 1.0


class _Layout:
    """It has a `layout`, as torch's tensors have; and no address."""

    layout = (1,)


class _Number(enum.IntEnum):
    ONE = 1


HUGE = 10**5000  # more digits than Python prints


def _read_only() -> np.ndarray:
    array = np.zeros((2, 2), np.float32)
    array.flags.writeable = False
    return array


def _scalar() -> np.float32:  # a tensor of no axes, and a number
    return np.float32(1)


# Each makes a value anew: some are changed by whoever looks at them.
_NOTHING: list[Callable[[], Any]] = [
    lambda: "tensor", lambda: "", lambda: b"", lambda: bytearray(8), lambda: memoryview(b"12"),
    list, lambda: [1.0, 2.0], lambda: [None], lambda: (), dict, lambda: {1: 2},
    lambda: {1, 2}, lambda: range(3), lambda: iter([1]), lambda: object(), lambda: int,
    lambda: print, lambda: Ellipsis, lambda: NotImplemented, lambda: math, _BadRepr, _Layout,
    lambda: 1j, lambda: decimal.Decimal(1), lambda: decimal.Decimal("nan"),
    lambda: datetime.datetime(2000, 1, 1), lambda: slice(1), lambda: "\ud800", lambda: "nul\0",
    lambda: [_BadRepr()], lambda: fi_ffi.DTYPES["float16"], lambda: fi_ffi.parse_device("cpu"),
    lambda: "x" * 100_000, lambda: [[[1]]], lambda: np.void(b"12"), lambda: np.str_("NHD"),
]  # fmt: skip
_NUMBERS: list[Callable[[], Any]] = [
    lambda: 0, lambda: 1, lambda: -1, lambda: 7, lambda: True, lambda: False, lambda: 2**31,
    lambda: -(2**31) - 1, lambda: 2**32, lambda: 2**53 + 1, lambda: 2**63 - 1, lambda: 2**63,
    lambda: -(2**63), lambda: -(2**63) - 1, lambda: 2**64, lambda: HUGE, lambda: -HUGE,
    lambda: 0.0, lambda: -0.0, lambda: 1.0, lambda: 0.5, lambda: -1.5, lambda: 1e-310,
    lambda: 1e308, lambda: math.nan, lambda: math.inf, lambda: -math.inf,
    lambda: np.float16("nan"), lambda: np.float32("inf"), lambda: np.float64(0.25),
    lambda: np.int8(-1), lambda: np.int64(2), lambda: np.uint64(2**64 - 1), lambda: np.True_,
    lambda: np.float32(3), lambda: np.array(1), lambda: np.array([1]), lambda: np.array(1.0),
    lambda: np.longdouble(1), lambda: np.complex64(1), lambda: fractions.Fraction(1, 3),
    lambda: fractions.Fraction(10) ** 400, _Index, _Float, lambda: _Number.ONE, lambda: 10**400,
    lambda: np.datetime64(1, "s"),
]  # fmt: skip
_ARRAYS: list[Callable[[], Any]] = [
    lambda: np.zeros((2, 2), object), lambda: np.zeros((2, 2), np.complex128),
    lambda: np.zeros((2, 2), ">f4"), lambda: np.array(["a", "b"]),
    lambda: np.zeros((2, 2), [("a", "f4"), ("b", "i4")]), lambda: np.zeros(2, "M8[s]"),
    lambda: np.zeros(3, bool)[::-1], lambda: np.zeros((0, 3), np.float16),
    lambda: np.zeros(9, np.uint8)[1:].view(np.float64), lambda: np.ma.masked_array([1.0], [True]),
    lambda: np.zeros((1,) * 30, np.float32), lambda: np.zeros((2, 3), np.longdouble), _read_only,
    lambda: np.lib.stride_tricks.as_strided(np.zeros(1, np.float16), (4, 16), (0, 0)),
    lambda: np.zeros(4, [("a", "u1"), ("b", "<f4")])["b"], _scalar,
    _BadExporter, _Capsule, _Device,
    *(functools.partial(Interface, **changes) for changes in INTERFACES),
]  # fmt: skip

NOT_TENSORS = [*_NOTHING, *_NUMBERS, *_ARRAYS[:7]]
ARRAYS = _ARRAYS
NUMBERS = _NUMBERS
NOT_NUMBERS = [lambda: None, *_NOTHING, *(made for made in _ARRAYS if made is not _scalar)]
ANYTHING = [lambda: None, *_NOTHING, *_NUMBERS, *_ARRAYS]
