"""Packers for the arguments of any function: containers, functions, and types of signatures.

`fi_ffi.abi.values` packs single values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import write_dl_tensor
from fi_ffi.abi.failure import check
from fi_ffi.abi.function import Entry
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import OBJECT_TYPES, CallArena, Object, find_global
from fi_ffi.abi.tensor import Device, index_of, parse_device
from fi_ffi.abi.values import (
    Packer,
    described,
    make_function,
    object_packer,
    pack_arguments,
    pack_bool,
    pack_bytes,
    pack_dtype,
    pack_float,
    pack_int,
    pack_none,
    pack_tensor,
    pack_text,
    packer_of_single,
    refuse,
)
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, printed
from fi_ffi.modules.types import FUNCTION, TypeExpr, parse_type
from fi_ffi.ops.call.arguments import INT32_MAX

_MAX_POINTER = 2**64 - 1


def call(entry: Entry, *args: object) -> Any:
    """Call an entry with any Python values; return a Python value or an owned object."""
    arena = CallArena(entry.name)
    try:
        packed = pack_arguments(args, arena, [(pack, str(i)) for i in range(len(args))])
        return entry.invoke(packed, len(args))
    finally:
        arena.end()


def pack(slot: Any, value: object, arena: CallArena, where: str) -> None:
    """Pack any value by its own type; a tensor becomes an object, which a callee may keep."""
    kind: Any = type(value)
    packer = _packer_of_type(kind)
    if packer is None:
        expected = "None, a number, text, bytes, a dtype, a device, a tensor, an object, a function"
        refuse(value, arena, where, f"{expected}, or a sequence or mapping of these")
    packer(slot, value, arena, where)


# ---------------------------------------------------------------- single values
def _c_text(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if issubclass(type(value), str) and str.find(value, "\0") >= 0:
        expected = "text without a NUL, where C's text ends"
        raise ArgumentError(arena.op, where, got=printed(value), expected=expected)
    pack_text(slot, value, arena, where)


def _device(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    value = parse_device(value, op=arena.op, argument=where)
    slot.type_index, written = TypeIndex.DEVICE, slot.v_device
    written.device_type, written.device_id = value.type_code, value.index


def _pointer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if value is None:
        return
    try:
        address = index_of(value)
    except TypeError:
        refuse(value, arena, where, "an address, as an int")
    if not 0 <= address <= _MAX_POINTER:
        raise ArgumentError(arena.op, where, got=address, expected="an address")
    slot.type_index, slot.v_ptr = TypeIndex.OPAQUE_PTR, ffi.cast("void *", address)


def _view(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    tensor = ffi.new("DLTensor *")
    arena.keep += (tensor, write_dl_tensor(tensor, described(value, arena, where)))
    slot.type_index, slot.v_ptr = TypeIndex.DL_TENSOR_PTR, tensor


_function_object = object_packer(FUNCTION, TypeIndex.FUNCTION)


def _function(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if isinstance(value, Object):
        _function_object(slot, value, arena, where)
    elif callable(value) and not isinstance(value, type):
        name = getattr(value, "__name__", type(value).__name__)
        function = arena.own(make_function(str(name), value, adopt=arena.adopt, pack_result=pack))
        slot.type_index, slot.v_ptr = TypeIndex.FUNCTION, function.handle
    elif value is not None:  # None is a null function, which TVM-FFI's function type allows
        refuse(value, arena, where, "a function")


# ---------------------------------------------------------------- containers
def _is_sequence(kind: type) -> bool:
    return issubclass(kind, Sequence) and not issubclass(kind, (str, bytes, bytearray))


def _snapshot(value: Any, elements: Iterable[Any], arena: CallArena, where: str) -> tuple[Any, ...]:
    """Copy a container's elements: it may change concurrently, or misreport its length."""
    if type(value) in (list, tuple):
        return tuple(elements)
    count = len(value)
    if count <= INT32_MAX:  # their number is an int32
        items = tuple(itertools.islice(elements, count + 1))
        if len(items) == count:
            return items
        got = f"a {type(value).__name__} of length {count} that gave {len(items)}"
    else:
        got = f"a {type(value).__name__} of length {count}"
    expected = f"as many elements as its length, {INT32_MAX} at most"
    raise ArgumentError(arena.op, where, got=got, expected=expected)


@functools.cache
def _container_maker(name: str) -> tuple[Any, Any]:
    """Return a function of libtvm_ffi and its handle, which holds the reference."""
    function = find_global(name)
    return function.safe_call, function.handle


def _container(
    name: str, index: int, items: Packer | tuple[Packer, ...], *others: int, maker: str = ""
) -> Packer:
    """Return a packer of objects with some type indices, or of sequences converted to one.

    `items` packs each element; a tuple has a packer for each.
    """
    whole, maker = object_packer(name, index, *others), maker or f"ffi.{name}"
    needed = f" of {len(items)}" if isinstance(items, tuple) else ""

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, arena, where)
        if not _is_sequence(type(value)):
            refuse(value, arena, where, f"a sequence{needed}, for its {name}")
        values = _snapshot(value, value, arena, where)
        if isinstance(items, tuple) and len(values) != len(items):
            got, expected = f"{len(values)} of them", f"{len(items)}, for its {name}"
            raise ArgumentError(arena.op, where, got=got, expected=expected)
        packers = items if isinstance(items, tuple) else itertools.repeat(items)
        names = (f"{where}[{i}]" for i in itertools.count())
        return _make(slot, maker, zip(packers, values, names, strict=False), len(values), arena)

    return packer


def _mapping(name: str, index: int, key: Packer, item: Packer) -> Packer:
    """Return a packer of objects with a type index, or of mappings converted to one."""
    whole, maker = object_packer(name, index), f"ffi.{name}"

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, arena, where)
        if not issubclass(type(value), Mapping):
            refuse(value, arena, where, f"a mapping, for its {name}")
        # dict.copy is atomic, whatever other threads do.
        value = dict.copy(value) if type(value) is dict else value
        pairs = _snapshot(value, value.items(), arena, where)
        parts = (
            part
            for i, (at, element) in enumerate(pairs)
            for part in (
                (key, at, f"{where}, key {i}"),
                (item, element, f"{where}[{printed(at, 40)}]"),
            )
        )
        return _make(slot, maker, parts, 2 * len(pairs), arena)

    return packer


def _make(
    slot: Any, maker: str, parts: Iterable[tuple[Packer, Any, str]], count: int, arena: CallArena
) -> None:
    """Write the container that the function `maker` returns; it is released after the call."""
    packed, result = ffi.new("TVMFFIAny[]", max(count, 1)), ffi.new("TVMFFIAny *")
    arena.level += 1
    arena.depth = max(arena.depth, arena.level)
    try:
        for i, (packer, value, where) in enumerate(parts):
            packer(packed[i], value, arena, where)
    finally:
        arena.level -= 1
    safe_call, handle = _container_maker(maker)
    check(safe_call(handle, packed, count, result), maker)
    container = arena.own(OBJECT_TYPES.get(result.type_index, Object)(result.v_ptr))
    slot.type_index, slot.v_ptr = result.type_index, container.handle


def _optional(item: Packer) -> Packer:
    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if value is not None:
            item(slot, value, arena, where)

    return packer


def _variant(choices: list[tuple[str, Packer]]) -> Packer:
    # float last: an int is accepted as a float only if there is no int alternative.
    ordered = sorted(choices, key=lambda choice: choice[0] == "float")
    names = " or ".join(name for name, _ in choices)

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        for _, choice in ordered:
            count = len(arena.descs)
            try:
                choice(slot, value, arena, where)
                return
            except ArgumentTypeError:
                del arena.descs[count:]
                slot.type_index, slot.v_int64 = TypeIndex.NONE, 0
        refuse(value, arena, where, names)

    return packer


# ---------------------------------------------------------------- which packer
_array = _container("Array", TypeIndex.ARRAY, pack, TypeIndex.LIST)
_map = _mapping("Map", TypeIndex.MAP, pack, pack)


@functools.lru_cache(256)
def _packer_of_type(kind: type) -> Packer | None:
    """Return the packer for a Python type; None if its values cannot be passed."""
    packer = packer_of_single(kind)
    if packer is not None:
        return packer
    for is_of_kind, packer in (
        (kind is Device, _device),
        (_is_sequence(kind), _array),
        (issubclass(kind, Mapping), _map),
        (issubclass(kind, Callable) and not issubclass(kind, type), _function),  # type: ignore[arg-type]
    ):
        if is_of_kind:
            return packer
    return None


_BY_NAME: dict[str, Packer] = {
    "Any": pack,
    "None": pack_none,
    "int": pack_int,
    "float": pack_float,
    "bool": pack_bool,
    "str": pack_text,
    "const char*": _c_text,
    "bytes": pack_bytes,
    "DataType": pack_dtype,
    "Device": _device,
    "void*": _pointer,
    "DLTensor*": _view,
    "ffi.Tensor": pack_tensor,
    "ffi.Shape": _container("ffi.Shape", TypeIndex.SHAPE, pack_int, maker="ffi.Shape"),
    FUNCTION: _function,
    "ffi.Module": object_packer("ffi.Module", TypeIndex.MODULE),
    "ffi.Error": object_packer("ffi.Error", TypeIndex.ERROR),
}


def packer_of(text: str) -> Packer:
    """Return the packer for a type as signatures spell it; `AbiError` if it is no type."""
    return _packer_of(parse_type(text))


@functools.cache
def _packer_of(spelled: TypeExpr) -> Packer:
    name, args = spelled.name, spelled.args
    items = tuple(_packer_of(arg) for arg in args)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name in ("Array", "List"):
        item = items[0] if items else pack
        return _container(name, TypeIndex.ARRAY, item, TypeIndex.LIST)
    if name in ("Map", "Dict") and len(items) in (0, 2):
        key, item = items or (pack, pack)
        return _mapping(name, TypeIndex.MAP if name == "Map" else TypeIndex.DICT, key, item)
    if name == "Tuple":
        return _container(name, TypeIndex.ARRAY, items, maker="ffi.Array")
    if name == "Optional" and len(items) == 1:
        return _optional(*items)
    if name == "Variant":
        return _variant([(arg.name, item) for arg, item in zip(args, items, strict=True)])
    return object_packer(name)


def ints_of(value: Object) -> tuple[int, ...]:
    """Return the ints of a Shape object."""
    handle = value.handle
    cell = ffi.cast("FiFfiShapeObject *", handle).cell
    if not cell.size:
        return ()
    if cell.data == ffi.NULL or cell.size > library.MAX_BYTES // 8:
        raise AbiError(f"an ffi.Shape with an impossible length of {cell.size} ints")
    return tuple(cell.data[0 : cell.size])
