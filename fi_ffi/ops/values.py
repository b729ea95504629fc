"""A call's values: numbers as their own types, and addresses that a kernel can use."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from fi_ffi.abi.frame import c_text
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops.row import Row, Scalar, Tensor, Text

_INT64 = 2**63


def number(op: str, arg: Scalar, value: Any) -> Any:
    """`value` as the scalar's own type; a bool is no number, and an int is a float.

    None stays what it is where it stands for a size.
    """
    if value is None and arg.size_of:
        return None
    if type(value) is not arg.type:
        wanted = {int: numbers.Integral, float: numbers.Real, bool: bool}[arg.type]
        if not isinstance(value, wanted) or (isinstance(value, bool) and arg.type is not bool):
            got = f"{type(value).__name__} {printed(value)}"
            raise ArgumentTypeError(op, arg.name, got=got, expected=arg.abi_type)
        try:
            value = arg.type(value)  # type: ignore[call-overload,arg-type]
        except OverflowError:
            raise ArgumentError(op, arg.name, got=value, expected="a finite number") from None
    if arg.type is int and not -_INT64 <= value < _INT64:
        raise ArgumentError(op, arg.name, got=value, expected="an int64")
    if arg.type is float and not abs(value) < float("inf"):
        raise ArgumentError(op, arg.name, got=value, expected="a finite number")
    if arg.low is not None and value < arg.low:
        raise ArgumentError(op, arg.name, got=value, expected=f"{arg.low} or more")
    if arg.high is not None and value > arg.high:
        raise ArgumentError(op, arg.name, got=value, expected=f"{arg.high} or less")
    if arg.multiple_of > 1 and value % arg.multiple_of:
        raise ArgumentError(op, arg.name, got=value, expected=f"a multiple of {arg.multiple_of}")
    return value


def word(op: str, arg: Text, value: object) -> int:
    """The address of a word, as C has text."""
    if type(value) is not str or value not in arg.words:
        got, expected = printed(value), " or ".join(map(repr, arg.words))
        raise ArgumentError(op, arg.name, got=got, expected=expected)
    return c_text(value)


def check_address(op: str, arg: Tensor, desc: TensorDesc, alignment: int) -> None:
    """Raise unless a kernel can use a tensor's address."""
    if (desc.ptr % alignment or not desc.ptr) and desc.layout.numel:
        expected = f"an address that is a multiple of {alignment} bytes, and not null"
        got = f"{desc.ptr:#x} for {desc.layout}"
        raise ArgumentError(op, arg.name, got=got, expected=expected)


def check_together(row: Row, descs: Sequence[TensorDesc | None], values: Sequence[Any]) -> None:
    """Raise where only some of the arguments are there that go together."""
    present = {arg.name for arg, desc in zip(row.tensors, descs, strict=True) if desc}
    present |= {
        arg.name
        for arg, value in zip(row.args, values, strict=True)
        if isinstance(arg, Scalar) and value
    }
    given = [name for name in row.together if name in present]
    if given and len(given) != len(row.together):
        missing = next(name for name in row.together if name not in present)
        expected = f"a value, as `{given[0]}` has one: they go together"
        raise ArgumentError(row.name, missing, got="none", expected=expected)
