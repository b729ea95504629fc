"""From a type in a signature to a packer, which is a function that packs a value as that type."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from fi_ffi.abi import packers, types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.containers import make
from fi_ffi.abi.device import Device
from fi_ffi.abi.dtypes import DType
from fi_ffi.abi.lent import Call
from fi_ffi.abi.objects import Object, Tensor
from fi_ffi.abi.packers import Packer, object_of, refuse
from fi_ffi.abi.spelling import FUNCTION, Spelled, parse_type
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")
_SINGLE: dict[str, Packer] = {
    "None": packers.none,
    "int": packers.integer,
    "float": packers.number,
    "bool": packers.boolean,
    "str": packers.text,
    "const char*": packers.c_text,
    "bytes": packers.raw,
    "DataType": packers.dtype,
    "Device": packers.device,
    "void*": packers.pointer,
    "DLTensor*": packers.view,
    "ffi.Tensor": packers.tensor,
    FUNCTION: packers.function,
    "ffi.Module": object_of("ffi.Module", types.MODULE),
    "ffi.Error": object_of("ffi.Error", types.ERROR),
}
_SEQUENCES = {"Array": "ffi.Array", "List": "ffi.List"}
_MAPPINGS = {"Map": ("ffi.Map", types.MAP), "Dict": ("ffi.Dict", types.DICT)}


def packer_of(text: str) -> Packer:
    """The packer for a type as signatures spell it; `AbiError` where it is no type."""
    return _packer_of(parse_type(text))


@functools.cache
def _packer_of(spelled: Spelled) -> Packer:
    name, args = spelled.name, spelled.args
    items = tuple(_packer_of(arg) for arg in args)
    if name in _SINGLE:
        return _SINGLE[name]
    if name in _SEQUENCES:
        return _sequence(_SEQUENCES[name], items[0] if items else anything, name)
    if name in _MAPPINGS and len(items) in (0, 2):
        key, item = items or (anything, anything)
        return _mapping(*_MAPPINGS[name], key, item, name)
    if name == "ffi.Shape":
        return _shape
    if name == "Tuple":
        return _tuple(items)
    if name == "Optional" and len(items) == 1:
        return _optional(*items)
    if name == "Variant":
        return _variant([(arg.name, item) for arg, item in zip(args, items, strict=True)])
    return anything if name == "Any" else object_of(name)


def anything(slot: Any, value: Any, call: Call, where: str) -> None:
    """Pack a value as what it is; a tensor becomes an object, which may be kept."""
    found = _BY_TYPE.get(type(value))
    if found is None:
        found = _kind_of(value)
    if found is None:
        expected = "None, a number, text, bytes, a dtype, a device, a tensor, an object, a function"
        refuse(value, call, where, f"{expected}, or a sequence or mapping of these")
    found(slot, value, call, where)


def _kind_of(value: Any) -> Packer | None:
    if isinstance(value, Object):
        return packers.tensor if isinstance(value, Tensor) else object_of("ffi.Object")
    if type(value).__name__ in ("bool", "bool_"):  # numpy's
        return packers.boolean
    if isinstance(value, numbers.Integral):
        return packers.integer
    if isinstance(value, numbers.Real):
        return packers.number
    if any(hasattr(type(value), name) for name in _PROTOCOLS):
        return packers.tensor
    if isinstance(value, str):
        return packers.text
    if isinstance(value, (bytes, bytearray, memoryview)):
        return packers.raw
    if isinstance(value, Sequence):
        return _sequence("ffi.Array", anything, "Array")
    if isinstance(value, Mapping):
        return _mapping("ffi.Map", types.MAP, anything, anything, "Map")
    return packers.function if callable(value) and not isinstance(value, type) else None


_BY_TYPE: dict[type, Packer] = {
    type(None): packers.none,
    bool: packers.boolean,
    int: packers.integer,
    float: packers.number,
    str: packers.text,
    DType: packers.dtype,
    Device: packers.device,
    TensorDesc: packers.tensor,
}


def _is_sequence(value: object) -> bool:
    if type(value) in (list, tuple):
        return True
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _array(slot: Any, maker: str, packed: Any, count: int, call: Call) -> None:
    """Write the container that a maker makes of packed values; released after the call."""
    made = call.own(make(maker, packed, count))
    slot.type_index = ffi.cast("TVMFFIObject *", made.handle).type_index
    slot.v_ptr = made.handle


def _sequence(maker: str, item: Packer, name: str) -> Packer:
    whole = object_of(name, types.ARRAY, types.LIST)

    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, call, where)
        if not _is_sequence(value):
            refuse(value, call, where, f"a sequence, for its {name}")
        packed = ffi.new("TVMFFIAny[]", max(len(value), 1))
        for i, element in enumerate(value):
            item(packed[i], element, call, f"{where}[{i}]")
        return _array(slot, maker, packed, len(value), call)

    return packer


_ints = _sequence("ffi.Shape", packers.integer, "ffi.Shape")
_whole_shape = object_of("ffi.Shape", types.SHAPE)


def _shape(slot: Any, value: Any, call: Call, where: str) -> None:
    (_whole_shape if isinstance(value, Object) else _ints)(slot, value, call, where)


def _tuple(items: tuple[Packer, ...]) -> Packer:
    whole = object_of("Tuple", types.ARRAY)

    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, call, where)
        if not _is_sequence(value):
            refuse(value, call, where, f"a sequence of {len(items)}, for its Tuple")
        if len(value) != len(items):
            got, expected = f"{len(value)} of them", f"{len(items)}, for its Tuple"
            raise ArgumentError(call.op, where, got=got, expected=expected)
        packed = ffi.new("TVMFFIAny[]", max(len(items), 1))
        for i, (item, element) in enumerate(zip(items, value, strict=True)):
            item(packed[i], element, call, f"{where}[{i}]")
        return _array(slot, "ffi.Array", packed, len(items), call)

    return packer


def _mapping(maker: str, index: int, key: Packer, item: Packer, name: str) -> Packer:
    whole = object_of(name, index)

    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, call, where)
        if not isinstance(value, Mapping):
            refuse(value, call, where, f"a mapping, for its {name}")
        packed = ffi.new("TVMFFIAny[]", max(2 * len(value), 1))
        for i, (at, element) in enumerate(value.items()):
            key(packed[2 * i], at, call, f"{where}, key {i}")
            item(packed[2 * i + 1], element, call, f"{where}[{printed(at, 40)}]")
        return _array(slot, maker, packed, 2 * len(value), call)

    return packer


def _optional(item: Packer) -> Packer:
    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        if value is not None:
            item(slot, value, call, where)

    return packer


def _variant(choices: list[tuple[str, Packer]]) -> Packer:
    # An int is a float too, for a float alone.
    ordered = sorted(choices, key=lambda choice: choice[0] == "float")
    names = " or ".join(name for name, _ in choices)

    def packer(slot: Any, value: Any, call: Call, where: str) -> None:
        for _, choice in ordered:
            described = len(call.descs)
            try:
                choice(slot, value, call, where)
            except ArgumentTypeError:
                del call.descs[described:]
                slot.type_index, slot.v_int64 = types.NONE, 0
            else:
                return
        refuse(value, call, where, names)

    return packer
