"""Host arrays of integers, as callers give them: read, and refused by name."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

if TYPE_CHECKING:
    import numpy

    Integers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

INT32_MAX = 2**31 - 1


def integers(op: str, argument: str, value: object) -> Integers:
    """A one-dimensional array of integers from 0 to what int32 holds."""
    import numpy as np

    expected = "a one-dimensional host array of integers"
    if isinstance(value, (list, tuple)):
        wrong = [v for v in value if not isinstance(v, numbers.Integral) or isinstance(v, bool)]
        if wrong:
            got = f"{type(wrong[0]).__name__} {printed(wrong[0])}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
        # Of Python's own integers: numpy makes floats of an empty list, and of large ones.
        array = np.array([int(v) for v in value], dtype=object)
    else:
        try:
            array = np.asarray(value)
        except Exception as error:  # the exporter's own: a GPU's array, for one
            got = f"a {type(value).__qualname__} that refused: {error}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected) from error
        if array.dtype.kind not in "iu":
            got = f"{type(value).__qualname__} of {array.dtype}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
    if array.ndim != 1:
        raise ArgumentError(op, argument, got=f"shape {array.shape}", expected=expected)
    fits = (array >= 0) & (array <= INT32_MAX)
    all_at(op, argument, array, fits.astype(bool), f"0 to {INT32_MAX}")
    return array.astype(np.int64)


def indptr(op: str, argument: str, value: object) -> Integers:
    starts = integers(op, argument, value)
    if not starts.size or starts[0] != 0:
        got = f"a first element of {starts[0]}" if starts.size else "no element"
        raise ArgumentError(op, argument, got=got, expected="0 and an end for each request")
    all_at(op, argument, starts[1:], starts[1:] >= starts[:-1], "elements that do not decrease", 1)
    return starts


def all_at(op: str, argument: str, array: Any, right: Any, expected: str, offset: int = 0) -> None:
    """Raise for the first element that is not `right`."""
    if not right.all():
        at = int(right.argmin())
        got = f"{array[at]} at {at + offset}"
        raise ArgumentError(op, argument, got=got, expected=expected)
