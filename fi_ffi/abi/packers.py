"""Packers of single values: numbers, text, tensors, objects, functions.

A packer writes one zeroed `TVMFFIAny`, or raises: `ArgumentTypeError` for what is not of its
type, `ArgumentError` for a value that the type cannot hold.  `where` names the argument.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any, NoReturn

from fi_ffi.abi import types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import parse_device
from fi_ffi.abi.dtypes import DType, parse_dtype
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.lent import Call, template
from fi_ffi.abi.objects import Object, Tensor
from fi_ffi.abi.spelling import FUNCTION
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.abi.values import desc_from_dl_tensor, pack
from fi_ffi.errors import ArgumentError, ArgumentTypeError, FiFfiError, printed

Packer = Callable[[Any, Any, Call, str], None]

_MAX_POINTER = 2**64 - 1


def refuse(value: object, call: Call, where: str, expected: str) -> NoReturn:
    got = f"{type(value).__name__} {printed(value)}"
    raise ArgumentTypeError(call.op, where, got=got, expected=expected)


def none(slot: Any, value: Any, call: Call, where: str) -> None:
    if value is not None:
        refuse(value, call, where, "None")


def integer(slot: Any, value: Any, call: Call, where: str) -> None:
    if type(value) is not int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            refuse(value, call, where, "an int")
        value = int(value)
    try:
        slot.v_int64 = value
    except OverflowError:
        raise ArgumentError(call.op, where, got=value, expected="an int64") from None
    slot.type_index = types.INT


def number(slot: Any, value: Any, call: Call, where: str) -> None:
    if type(value) is not float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            refuse(value, call, where, "a float")
        try:
            value = float(value)
        except OverflowError:
            expected = "a number within float64"
            raise ArgumentError(call.op, where, got=value, expected=expected) from None
    slot.type_index, slot.v_float64 = types.FLOAT, value


def boolean(slot: Any, value: Any, call: Call, where: str) -> None:
    if type(value) is not bool:
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's
            refuse(value, call, where, "a bool")
        value = bool(value)
    slot.type_index, slot.v_int64 = types.BOOL, value


def text(slot: Any, value: Any, call: Call, where: str) -> None:
    if not isinstance(value, str):
        refuse(value, call, where, "a str")
    pack(slot, str(value), call.keep, call.op, where)


def c_text(slot: Any, value: Any, call: Call, where: str) -> None:
    if isinstance(value, str) and "\0" in value:
        expected = "text without a NUL, where C's text ends"
        raise ArgumentError(call.op, where, got=printed(value), expected=expected)
    text(slot, value, call, where)


def raw(slot: Any, value: Any, call: Call, where: str) -> None:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        refuse(value, call, where, "bytes")
    pack(slot, bytes(value), call.keep, call.op, where)


def dtype(slot: Any, value: Any, call: Call, where: str) -> None:
    if type(value) is not DType:
        value = parse_dtype(value, op=call.op, argument=where)
    pack(slot, value, call.keep, call.op, where)


def device(slot: Any, value: Any, call: Call, where: str) -> None:
    pack(slot, parse_device(value, op=call.op, argument=where), call.keep, call.op, where)


def pointer(slot: Any, value: Any, call: Call, where: str) -> None:
    if value is None:
        return
    try:
        if isinstance(value, bool):
            raise TypeError
        address = operator.index(value)
    except TypeError:
        refuse(value, call, where, "an address, as an int")
    if not 0 <= address <= _MAX_POINTER:
        raise ArgumentError(call.op, where, got=address, expected="an address")
    slot.type_index, slot.v_ptr = types.OPAQUE_PTR, ffi.cast("void *", address)


def _described(value: Any, call: Call, where: str) -> TensorDesc:
    """A tensor's descriptor, told to the call."""
    if isinstance(value, Tensor):
        cell = ffi.cast("FiFfiTensorObject *", _handle(value, call, where)).cell
        desc = desc_from_dl_tensor(cell)
    else:
        desc = as_desc(value, call.op, where)
    call.descs.append((where, desc))
    call.keep.append((value, desc))
    return desc


def view(slot: Any, value: Any, call: Call, where: str) -> None:
    desc = _described(value, call, where)
    tensor = ffi.new("DLTensor *", template(desc.layout))
    tensor.data = ffi.cast("void *", desc.ptr)
    call.keep.append(tensor)
    slot.type_index, slot.v_ptr = types.DL_TENSOR_PTR, tensor


def tensor(slot: Any, value: Any, call: Call, where: str) -> None:
    desc = _described(value, call, where)
    made = value if isinstance(value, Tensor) else call.tensor(desc)
    slot.type_index, slot.v_ptr = types.TENSOR, made.handle


def _handle(value: Object, call: Call, where: str) -> Any:
    try:
        return value.handle
    except FiFfiError:
        got = f"a {type(value).__name__} that was released"
        raise ArgumentError(call.op, where, got=got, expected="an object still held") from None


def _put(slot: Any, value: Object, call: Call, where: str) -> None:
    handle = _handle(value, call, where)
    # The header's own index, not the wrapper's: subclasses of Object in C++.
    slot.type_index = ffi.cast("TVMFFIObject *", handle).type_index
    slot.v_ptr = handle
    call.keep.append(value)


def object_of(name: str, *indices: int) -> Packer:
    """Owned objects, of some of the library's own types where those are named."""

    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        if not isinstance(value, Object):
            refuse(value, call, where, f"an object of type {name}")
        _put(slot, value, call, where)
        if indices and slot.type_index not in indices:
            refuse(value, call, where, f"an object of type {name}")

    return packer


_function_object = object_of(FUNCTION, types.FUNCTION)


def function(slot: Any, value: Any, call: Call, where: str) -> None:
    if isinstance(value, Object):
        _function_object(slot, value, call, where)
    elif callable(value) and not isinstance(value, type):
        slot.type_index, slot.v_ptr = types.FUNCTION, call.function(value).handle
    elif value is not None:  # a null function, which TVM-FFI's own type may be
        refuse(value, call, where, "a function")
