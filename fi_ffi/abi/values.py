"""Conversion of Python values to and from `TVMFFIAny`: a packer for each kind, and one reader.

This is the general path, for arguments of any function, elements of containers, and callbacks.
Calls of ops use their own frames (function.py).

A packer writes one zeroed `TVMFFIAny`. It raises `ArgumentTypeError` for a value of another type
and `ArgumentError` for a value that the type cannot hold. `where` names the argument. The
`CallArena` keeps what the value needs until the call ends.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import desc_from_dl_tensor, write_dl_tensor
from fi_ffi.abi.failure import check, prepare_fallbacks, set_escaped, set_raised
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import (
    OBJECT_TYPES,
    CallArena,
    Function,
    Object,
    String,
    Tensor,
    bytes_of,
    find_global,
)
from fi_ffi.abi.signature import FUNCTION, Signature, TypeExpr, parse_type
from fi_ffi.abi.tensor import (
    Device,
    DType,
    TensorDesc,
    device_from_code,
    dtype_from_code,
    index_of,
    parse_device,
    parse_dtype,
)
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, FiFfiError, printed

Packer = Callable[[Any, Any, CallArena, str], None]

_SMALL = 8  # bytes stored inside a `TVMFFIAny`
_MAX_POINTER = 2**64 - 1
_MOST_VALUES = 2**31 - 1  # values of one call; their number is an int32
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")


def pack_arguments(
    args: Sequence[object], arena: CallArena, params: Sequence[tuple[Packer, str]] | None = None
) -> Any:
    """Return a `TVMFFIAny[]` of a call's arguments, packed by parameter or by value's type."""
    packed = ffi.new("TVMFFIAny[]", max(len(args), 1))
    for i, value in enumerate(args):
        packer, where = (pack, str(i)) if params is None else params[i]
        packer(packed[i], value, arena, where)
    return packed


def pack(slot: Any, value: object, arena: CallArena, where: str) -> None:
    """Pack a value by its own type; a tensor becomes an object, which a callee may keep."""
    kind: Any = type(value)
    packer = _packer_of_type(kind)
    if packer is None:
        expected = "None, a number, text, bytes, a dtype, a device, a tensor, an object, a function"
        _refuse(value, arena, where, f"{expected}, or a sequence or mapping of these")
    packer(slot, value, arena, where)


def _refuse(value: object, arena: CallArena, where: str, expected: str) -> NoReturn:
    got = f"{type(value).__name__} {printed(value)}"
    raise ArgumentTypeError(arena.op, where, got=got, expected=expected) from None


# ---------------------------------------------------------------- single values
def _none(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if value is not None:
        _refuse(value, arena, where, "None")


def _is_bool(kind: type) -> bool:
    return kind.__name__ in ("bool", "bool_")  # numpy's bool too


def _number(
    plain: type[int] | type[float], abstract: type, index: int, field: str,
    expected: str, limit: str,
) -> Packer:  # fmt: skip
    """Return a packer for one kind of number, Python's own or any type registered as such."""

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        kind = type(value)
        if kind is not plain and (not issubclass(kind, abstract) or _is_bool(kind)):
            _refuse(value, arena, where, expected)
        try:
            value = value if kind is plain else plain(value)
            setattr(slot, field, value)
        except OverflowError:
            raise ArgumentError(arena.op, where, got=value, expected=limit) from None
        slot.type_index = index

    return packer


_integer = _number(int, numbers.Integral, TypeIndex.INT, "v_int64", "an int", "an int64")
_float = _number(
    float, numbers.Real, TypeIndex.FLOAT, "v_float64", "a float", "a number within float64"
)


def _boolean(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not _is_bool(type(value)):
        _refuse(value, arena, where, "a bool")
    slot.type_index, slot.v_int64 = TypeIndex.BOOL, bool(value)


def _text(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not issubclass(type(value), str):
        _refuse(value, arena, where, "a str")
    try:
        encoded = str.encode(value)
    except UnicodeEncodeError:
        got = f"{printed(value)}, with a lone surrogate"
        raise ArgumentError(
            arena.op, where, got=got, expected="text that UTF-8 can encode"
        ) from None
    if b"\0" not in encoded:
        text = ffi.new("char[]", encoded)
        arena.keep.append(text)
        slot.type_index, slot.v_c_str = TypeIndex.RAW_STR, text
        return
    # A C string would end at the NUL; libtvm_ffi's own strings store their length.
    array, _buffer = library.byte_array(encoded)
    check(library.lib.TVMFFIStringFromByteArray(array, ffi.addressof(slot)), arena.op)
    if slot.type_index == TypeIndex.STR:
        arena.own(String(slot.v_ptr))


def _c_text(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if issubclass(type(value), str) and str.find(value, "\0") >= 0:
        expected = "text without a NUL, where C's text ends"
        raise ArgumentError(arena.op, where, got=printed(value), expected=expected)
    _text(slot, value, arena, where)


def _bytes(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not issubclass(type(value), (bytes, bytearray, memoryview)):
        _refuse(value, arena, where, "bytes")
    array, buffer = library.byte_array(bytes(value))
    arena.keep += (array, buffer)
    slot.type_index, slot.v_ptr = TypeIndex.BYTE_ARRAY_PTR, array


def _dtype(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if type(value) is not DType:
        value = parse_dtype(value, op=arena.op, argument=where)
    slot.type_index, written = TypeIndex.DATA_TYPE, slot.v_dtype
    written.code, written.bits, written.lanes = value.code, value.bits, value.lanes


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
        _refuse(value, arena, where, "an address, as an int")
    if not 0 <= address <= _MAX_POINTER:
        raise ArgumentError(arena.op, where, got=address, expected="an address")
    slot.type_index, slot.v_ptr = TypeIndex.OPAQUE_PTR, ffi.cast("void *", address)


# ---------------------------------------------------------------- tensors and objects
def _described(value: Any, arena: CallArena, where: str) -> TensorDesc:
    """Describe a tensor and record it in the call's arena."""
    if isinstance(value, Tensor):
        _handle(value, arena, where)
        desc = value.described()
    else:
        desc = as_desc(value, arena.op, where)
    arena.descs.append((where, desc))
    arena.keep.append((value, desc))
    return desc


def _view(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    tensor = ffi.new("DLTensor *")
    arena.keep += (tensor, write_dl_tensor(tensor, _described(value, arena, where)))
    slot.type_index, slot.v_ptr = TypeIndex.DL_TENSOR_PTR, tensor


def _tensor(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    desc = _described(value, arena, where)
    if arena.is_result and desc is value and desc.owner is None:
        expected = "a tensor with an owner: what it is a view of may be gone when it is read"
        raise ArgumentTypeError(arena.op, where, got=value, expected=expected)
    made = value if isinstance(value, Tensor) else arena.own(Tensor.from_desc(desc))
    slot.type_index, slot.v_ptr = TypeIndex.TENSOR, made.handle


def _handle(value: Object, arena: CallArena, where: str) -> Any:
    try:
        return value.handle
    except FiFfiError:
        got = f"a {type(value).__name__} that was released"
    raise ArgumentError(arena.op, where, got=got, expected="an object still held")


def _object_of(name: str, *indices: int) -> Packer:
    """Return a packer of owned objects, of any type or of libtvm_ffi's types in `indices`."""

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if not issubclass(type(value), Object):
            _refuse(value, arena, where, f"an object of type {name}")
        handle = _handle(value, arena, where)
        # The header's index, not the wrapper's, since C++ may define subclasses of Object.
        index = library.type_index_of(handle)
        if indices and index not in indices:
            _refuse(value, arena, where, f"an object of type {name}")
        slot.type_index, slot.v_ptr = index, handle
        arena.keep.append(value)

    return packer


_any_object = _object_of("ffi.Object")
_function_object = _object_of(FUNCTION, TypeIndex.FUNCTION)


def _function(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if isinstance(value, Object):
        _function_object(slot, value, arena, where)
    elif callable(value) and not isinstance(value, type):
        name = getattr(value, "__name__", type(value).__name__)
        made = arena.own(make_function(str(name), value, adopt=arena.adopt))
        slot.type_index, slot.v_ptr = TypeIndex.FUNCTION, made.handle
    elif value is not None:  # None is a null function, which TVM-FFI's function type allows
        _refuse(value, arena, where, "a function")


# ---------------------------------------------------------------- containers
def _is_sequence(kind: type) -> bool:
    return issubclass(kind, Sequence) and not issubclass(kind, (str, bytes, bytearray))


def _snapshot(value: Any, elements: Iterable[Any], arena: CallArena, where: str) -> tuple[Any, ...]:
    """Copy a container's elements: it may change concurrently, or misreport its length."""
    if type(value) in (list, tuple):
        return tuple(elements)
    count = len(value)
    if count <= _MOST_VALUES:
        found = tuple(itertools.islice(elements, count + 1))
        if len(found) == count:
            return found
        got = f"a {type(value).__name__} of length {count} that gave {len(found)}"
    else:
        got = f"a {type(value).__name__} of length {count}"
    expected = f"as many elements as its length, {_MOST_VALUES} at most"
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
    whole, maker = _object_of(name, index, *others), maker or f"ffi.{name}"
    needed = f" of {len(items)}" if isinstance(items, tuple) else ""

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, arena, where)
        if not _is_sequence(type(value)):
            _refuse(value, arena, where, f"a sequence{needed}, for its {name}")
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
    whole, maker = _object_of(name, index), f"ffi.{name}"

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if isinstance(value, Object):
            return whole(slot, value, arena, where)
        if not issubclass(type(value), Mapping):
            _refuse(value, arena, where, f"a mapping, for its {name}")
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
    for i, (packer, value, where) in enumerate(parts):
        packer(packed[i], value, arena, where)
    call, handle = _container_maker(maker)
    check(call(handle, packed, count, result), maker)
    made = arena.own(OBJECT_TYPES.get(result.type_index, Object)(result.v_ptr))
    slot.type_index, slot.v_ptr = result.type_index, made.handle


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
            described = len(arena.descs)
            try:
                return choice(slot, value, arena, where)
            except ArgumentTypeError:
                del arena.descs[described:]
                slot.type_index, slot.v_int64 = TypeIndex.NONE, 0
        _refuse(value, arena, where, names)

    return packer


# ---------------------------------------------------------------- which packer
_array = _container("Array", TypeIndex.ARRAY, pack, TypeIndex.LIST)
_map = _mapping("Map", TypeIndex.MAP, pack, pack)

_OWN_TYPES: dict[type, Packer] = {
    type(None): _none, DType: _dtype, Device: _device, TensorDesc: _tensor,
}  # fmt: skip


@functools.lru_cache(256)
def _packer_of_type(kind: type) -> Packer | None:
    """Return the packer for a Python type; None if its values cannot be passed."""
    if kind in _OWN_TYPES:
        return _OWN_TYPES[kind]
    if issubclass(kind, Object):
        return _tensor if issubclass(kind, Tensor) else _any_object
    if _is_bool(kind):
        return _boolean
    for found, packer in (
        (issubclass(kind, numbers.Integral), _integer),
        (issubclass(kind, numbers.Real), _float),
        (issubclass(kind, str), _text),
        (issubclass(kind, (bytes, bytearray, memoryview)), _bytes),
        (any(hasattr(kind, name) for name in _PROTOCOLS), _tensor),
        (_is_sequence(kind), _array),
        (issubclass(kind, Mapping), _map),
        (issubclass(kind, Callable) and not issubclass(kind, type), _function),  # type: ignore[arg-type]
    ):
        if found:
            return packer
    return None


_BY_NAME: dict[str, Packer] = {
    "Any": pack,
    "None": _none,
    "int": _integer,
    "float": _float,
    "bool": _boolean,
    "str": _text,
    "const char*": _c_text,
    "bytes": _bytes,
    "DataType": _dtype,
    "Device": _device,
    "void*": _pointer,
    "DLTensor*": _view,
    "ffi.Tensor": _tensor,
    "ffi.Shape": _container("ffi.Shape", TypeIndex.SHAPE, _integer, maker="ffi.Shape"),
    FUNCTION: _function,
    "ffi.Module": _object_of("ffi.Module", TypeIndex.MODULE),
    "ffi.Error": _object_of("ffi.Error", TypeIndex.ERROR),
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
    return _object_of(name)


# ---------------------------------------------------------------- reading
def unpack(slot: Any, *, owned: bool) -> Any:
    """Return the Python value of a `TVMFFIAny`.

    With `owned`, the slot holds a reference (a call's result), which is taken over; do not use the
    slot again. Otherwise (an argument of a callback) objects are borrowed and get a new reference.
    """
    index = slot.type_index
    reader = _READERS.get(index)
    if reader is not None:
        return reader(slot)
    if index < TypeIndex.OBJECT_BEGIN:
        raise AbiError(f"a TVM-FFI value of type index {index} has no Python form")
    made = _pointed(slot, "TVMFFIObject *").type_index
    if made != index:  # not released either: its real type is unknown
        raise AbiError(f"a TVM-FFI value of type index {index}, its object of {made}")
    if not owned:
        library.lib.TVMFFIObjectIncRef(slot.v_ptr)
    value = OBJECT_TYPES.get(index, Object)(slot.v_ptr)
    if index in (TypeIndex.STR, TypeIndex.BYTES):
        with value:
            found = bytes_of(value)
        return found if index == TypeIndex.BYTES else found.decode(errors="replace")
    return value


def ints_of(value: Object) -> tuple[int, ...]:
    """Return the ints of a Shape object."""
    cell = ffi.cast("FiFfiShapeObject *", value.handle).cell
    if not cell.size:
        return ()
    if cell.data == ffi.NULL or cell.size > library.MAX_BYTES // 8:
        raise AbiError(f"an ffi.Shape with an impossible length of {cell.size} ints")
    return tuple(cell.data[0 : cell.size])


def _pointed(slot: Any, kind: str) -> Any:
    if slot.v_ptr == ffi.NULL:
        raise AbiError(f"a TVM-FFI value of type index {slot.type_index} that is a null pointer")
    return ffi.cast(kind, slot.v_ptr)


def _read_dtype(slot: Any) -> DType:
    code, bits, lanes = slot.v_dtype.code, slot.v_dtype.bits, slot.v_dtype.lanes
    dtype = dtype_from_code(code, bits, lanes)
    if dtype is None:
        raise AbiError(f"a value that is a dtype fi_ffi does not know: {code}:{bits}:{lanes}")
    return dtype


def _read_device(slot: Any) -> Device:
    device = device_from_code(slot.v_device.device_type, slot.v_device.device_id)
    if device is None:
        raise AbiError(f"a device of unknown type {slot.v_device.device_type}")
    return device


def _read_small(slot: Any) -> bytes:
    if slot.small_str_len > _SMALL:
        raise AbiError(f"an inline string of {slot.small_str_len} bytes, where {_SMALL} have room")
    return bytes(ffi.buffer(slot.v_bytes, slot.small_str_len))


_READERS: dict[int, Callable[[Any], Any]] = {
    TypeIndex.NONE: lambda slot: None,
    TypeIndex.INT: lambda slot: slot.v_int64,
    TypeIndex.BOOL: lambda slot: slot.v_int64 != 0,
    TypeIndex.FLOAT: lambda slot: slot.v_float64,
    TypeIndex.OPAQUE_PTR: lambda slot: library.address_of(slot.v_ptr),
    TypeIndex.DATA_TYPE: _read_dtype,
    TypeIndex.DEVICE: _read_device,
    TypeIndex.DL_TENSOR_PTR: lambda slot: desc_from_dl_tensor(_pointed(slot, "DLTensor *")),
    TypeIndex.RAW_STR: lambda slot: ffi.string(_pointed(slot, "char *")).decode(errors="replace"),
    TypeIndex.BYTE_ARRAY_PTR: lambda slot: library.read_bytes(_pointed(slot, "TVMFFIByteArray *")),
    TypeIndex.SMALL_STR: lambda slot: _read_small(slot).decode(errors="replace"),
    TypeIndex.SMALL_BYTES: _read_small,
}


# ---------------------------------------------------------------- callbacks
_SAFE_CALL = "int(void *, const TVMFFIAny *, int32_t, TVMFFIAny *)"


def make_function(
    name: str, function: Callable[..., Any], signature: Signature | None = None,
    adopt: Callable[[Any], Any] | None = None,
) -> Function:  # fmt: skip
    """Return a Function object that calls a Python function; an exception becomes a TVM-FFI error.

    With a signature, the function refuses a wrong argument count with the message of a compiled
    one, so that `probe` reads the signature.
    """

    def call(self: Any, args: Any, count: int, result: Any) -> int:
        owned, arena = ffi.new("TVMFFIAny *"), CallArena(name)
        try:
            if signature is not None and count != len(signature.params):
                raise TypeError(
                    f"Mismatched number of arguments when calling: `{signature}`. "
                    f"Expected {len(signature.params)} but got {count} arguments"
                )
            value = function(*(_argument(args[i], adopt) for i in range(count)))
            _pack_result(owned, value, arena)
            result[0] = owned[0]
        except BaseException as error:
            # The caller of a failed call must not find a result that it might release as well.
            result.type_index, result.v_int64 = TypeIndex.NONE, 0
            if owned.type_index >= TypeIndex.OBJECT_BEGIN:
                library.lib.TVMFFIObjectDecRef(owned.v_ptr)
            set_raised(error)
            return -1
        finally:
            arena.end()
        return 0

    prepare_fallbacks()
    callback = ffi.callback(_SAFE_CALL, call, error=-1, onerror=set_escaped)
    slot = ffi.new("TVMFFIObjectHandle *")
    check(library.lib.TVMFFIFunctionCreate(ffi.NULL, callback, ffi.NULL, slot), name)
    return Function(slot[0], (ffi.NULL, callback))


def _pack_result(result: Any, value: object, arena: CallArena) -> None:
    """Write a callback's result, which must own its memory, unlike an argument."""
    arena.is_result = True
    view = ffi.new("TVMFFIAny *")
    pack(view[0], value, arena, "result")
    check(library.lib.TVMFFIAnyViewToOwnedAny(view, result), arena.op)


def _argument(slot: Any, adopt: Callable[[Any], Any] | None) -> Any:
    value = unpack(slot, owned=False)
    if isinstance(value, Tensor):
        return value.described(value)  # keeps the Tensor object alive with the view
    return value if adopt is None else adopt(value)
