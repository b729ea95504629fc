"""Checks of arguments that no row describes: numbers, flags, words, and host arrays of integers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

if TYPE_CHECKING:
    import numpy

    Integers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def shown(value: object) -> str:
    """Describe a refused value for an error. For most types the type's name suffices; a tensor's
    repr would read it from the device."""
    name = type(value).__name__
    return f"{name} {printed(value)}" if isinstance(value, (int, float, str, bytes)) else name


class Refusal:
    """Makes the errors of one op: `raise refuse("top_k", top_k, "1 or more")`."""

    __slots__ = ("op",)

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, argument: str, got: object, expected: object) -> ArgumentError:
        """Make the error for a value that cannot be used."""
        return ArgumentError(self.op, argument, got=got, expected=str(expected))

    def type(self, argument: str, value: object, expected: str) -> ArgumentTypeError:
        """Make the error for a value of the wrong type."""
        return ArgumentTypeError(self.op, argument, got=shown(value), expected=expected)


def check_int(op: str, argument: str, value: object, low: int, high: int = INT32_MAX) -> int:
    """Return an integer from `low` to `high` as an int; refuse anything else."""
    if type(value) is not int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ArgumentTypeError(op, argument, got=shown(value), expected="int")
        value = int(value)
    if not low <= value <= high:
        raise ArgumentError(op, argument, got=value, expected=f"an int from {low} to {high}")
    return value


def check_number(op: str, argument: str, value: object, above: float = -math.inf) -> float:
    """Return a finite number greater than `above` as a float; refuse anything else."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentTypeError(op, argument, got=shown(value), expected="a number")
    try:
        plain = float(value)
    except OverflowError:  # an int too large for a float
        plain = math.inf
    if not above < plain < math.inf:
        least = "" if above == -math.inf else f" above {above:g}"
        raise ArgumentError(op, argument, got=value, expected=f"a finite number{least}")
    return plain


def check_flag(op: str, argument: str, value: object) -> bool:
    """Return a bool; refuse anything else."""
    if type(value) is not bool:
        raise ArgumentTypeError(op, argument, got=shown(value), expected="bool")
    return value


def check_choice(op: str, argument: str, value: object, allowed: Collection[str]) -> str:
    """Return one of a few words; refuse anything else."""
    if not isinstance(value, str) or value not in allowed:
        kind = ArgumentError if isinstance(value, str) else ArgumentTypeError
        expected = " or ".join(map(repr, allowed))
        raise kind(op, argument, got=printed(value), expected=expected)
    return value


def check_int_array(op: str, argument: str, value: object) -> Integers:
    """Return a one-dimensional array of integers from 0 to the largest int32."""
    import numpy as np

    expected = "a one-dimensional host array of integers"
    if isinstance(value, (list, tuple)):
        wrong = [v for v in value if not isinstance(v, numbers.Integral) or isinstance(v, bool)]
        if wrong:
            raise ArgumentTypeError(op, argument, got=shown(wrong[0]), expected=expected)
        # dtype object: numpy would turn an empty list, and large ints, into floats.
        array = np.array([int(v) for v in value], dtype=object)
    else:
        try:
            array = np.asarray(value)
        except Exception as error:  # any error of the exporter, such as a GPU array's
            got = f"a {type(value).__qualname__} that refused: {error}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected) from error
        if array.dtype.kind not in "iu":
            got = f"{type(value).__qualname__} of {array.dtype}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
    if array.ndim != 1:
        raise ArgumentError(op, argument, got=f"shape {array.shape}", expected=expected)
    fits = (array >= 0) & (array <= INT32_MAX)
    check_each(op, argument, array, fits.astype(bool), f"0 to {INT32_MAX}")
    return array.astype(np.int64)


def check_indptr(op: str, argument: str, value: object) -> Integers:
    """Return where each request starts, and the end; refuse arrays that do not start at 0 or
    decrease."""
    starts = check_int_array(op, argument, value)
    if not starts.size or starts[0] != 0:
        got = f"a first element of {starts[0]}" if starts.size else "no element"
        raise ArgumentError(op, argument, got=got, expected="0 and an end for each request")
    rising = starts[1:] >= starts[:-1]
    check_each(op, argument, starts[1:], rising, "elements that do not decrease", 1)
    return starts


def check_each(
    op: str, argument: str, array: Any, right: Any, expected: str, offset: int = 0
) -> None:
    """Raise for the first element that is not `right`."""
    if not right.all():
        at = int(right.argmin())
        got = f"{array[at]} at {at + offset}"
        raise ArgumentError(op, argument, got=got, expected=expected)
