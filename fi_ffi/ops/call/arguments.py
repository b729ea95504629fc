"""Checks of arguments that no row describes: numbers, flags and words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

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
