"""Conversion of Python values to and from `TVMFFIAny`: packers of single values, and one reader.

Calls of ops use their own frames (function.py). `fi_ffi.modules` packs everything else: containers,
functions, and arguments by the types that a signature declares.

A packer writes one zeroed `TVMFFIAny`. It raises `ArgumentTypeError` for a value of another type
and `ArgumentError` for a value that the type cannot hold. `where` names the argument. The
`CallArena` keeps what the value needs until the call ends.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import desc_from_dl_tensor
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
    tensor_of,
)
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.tensor import (
    Device,
    DType,
    TensorDesc,
    device_from_code,
    dtype_of,
    parse_dtype,
)
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, FiFfiError, printed, with_type

Packer = Callable[[Any, Any, CallArena, str], None]

_TEXTS = TypeIndex.STR, TypeIndex.BYTES
_SMALL = 8  # bytes stored inside a `TVMFFIAny`
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")


def pack_arguments(
    args: Sequence[object], arena: CallArena, params: Sequence[tuple[Packer, str]] | None = None
) -> Any:
    """Return a `TVMFFIAny[]` of a call's arguments, each packed by its parameter or by `pack`."""
    packed = ffi.new("TVMFFIAny[]", max(len(args), 1))
    for i, value in enumerate(args):
        packer, where = (pack, str(i)) if params is None else params[i]
        packer(packed[i], value, arena, where)
    return packed


def pack(slot: Any, value: object, arena: CallArena, where: str) -> None:
    """Pack a single value by its own type; a tensor becomes an object, which a callee may keep."""
    kind: Any = type(value)
    packer = packer_of_single(kind)
    if packer is None:
        refuse(value, arena, where, "None, a number, text, bytes, a dtype, a tensor or an object")
    packer(slot, value, arena, where)


@functools.lru_cache(256)
def packer_of_single(kind: type) -> Packer | None:
    """Return the packer for the single values of a Python type; None for any other type."""
    if kind in _OWN_TYPES:
        return _OWN_TYPES[kind]
    if issubclass(kind, Object):
        return pack_tensor if issubclass(kind, Tensor) else pack_object
    if _is_bool(kind):
        return pack_bool
    kinds: tuple[tuple[Any, Packer], ...] = (
        (numbers.Integral, pack_int),
        (numbers.Real, pack_float),
        (str, pack_text),
        ((bytes, bytearray, memoryview), pack_bytes),
    )
    for abstract, packer in kinds:
        if issubclass(kind, abstract):
            return packer
    return pack_tensor if any(hasattr(kind, name) for name in _PROTOCOLS) else None


def refuse(value: object, arena: CallArena, where: str, expected: str) -> NoReturn:
    got = with_type(value)
    raise ArgumentTypeError(arena.op, where, got=got, expected=expected) from None


# ---------------------------------------------------------------- single values
def pack_none(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if value is not None:
        refuse(value, arena, where, "None")


def _is_bool(kind: type) -> bool:
    return kind.__name__ in ("bool", "bool_")  # numpy's bool too


def _number(
    plain: type[int] | type[float], abstract: type, index: int, field: str, limit: str
) -> Packer:
    """Return a packer for one kind of number, Python's own or any type registered as such."""
    expected = "an int" if plain is int else "a float"

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        kind = type(value)
        if kind is not plain and (not issubclass(kind, abstract) or _is_bool(kind)):
            refuse(value, arena, where, expected)
        try:
            value = value if kind is plain else plain(value)
            setattr(slot, field, value)
        except OverflowError:
            raise ArgumentError(arena.op, where, got=value, expected=limit) from None
        slot.type_index = index

    return packer


pack_int = _number(int, numbers.Integral, TypeIndex.INT, "v_int64", "an int64")
pack_float = _number(float, numbers.Real, TypeIndex.FLOAT, "v_float64", "a number within float64")


def pack_bool(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not _is_bool(type(value)):
        refuse(value, arena, where, "a bool")
    slot.type_index, slot.v_int64 = TypeIndex.BOOL, bool(value)


def pack_text(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not issubclass(type(value), str):
        refuse(value, arena, where, "a str")
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


def pack_bytes(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if not issubclass(type(value), (bytes, bytearray, memoryview)):
        refuse(value, arena, where, "bytes")
    array, buffer = library.byte_array(bytes(value))
    arena.keep += (array, buffer)
    slot.type_index, slot.v_ptr = TypeIndex.BYTE_ARRAY_PTR, array


def pack_dtype(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    if type(value) is not DType:
        value = parse_dtype(value, op=arena.op, argument=where)
    slot.type_index, written = TypeIndex.DATA_TYPE, slot.v_dtype
    written.code, written.bits, written.lanes = value.code, value.bits, value.lanes


# ---------------------------------------------------------------- tensors and objects
def described(value: Any, arena: CallArena, where: str) -> TensorDesc:
    """Describe a tensor and record it in the call's arena."""
    if isinstance(value, Tensor):
        desc = tensor_of(_handle(value, arena, where))
    else:
        desc = as_desc(value, arena.op, where)
    arena.descs.append((where, desc))
    arena.keep.append((value, desc))
    return desc


def pack_tensor(slot: Any, value: Any, arena: CallArena, where: str) -> None:
    desc = described(value, arena, where)
    if arena.is_result and desc is value and desc.owner is None:
        expected = "a tensor with an owner: what it is a view of may be gone when it is read"
        raise ArgumentTypeError(arena.op, where, got=value, expected=expected)
    is_object = isinstance(value, Tensor)
    handle: Any = desc.owner if is_object else arena.own(Tensor.from_desc(desc)).handle
    slot.type_index, slot.v_ptr = TypeIndex.TENSOR, handle


def _handle(value: Object, arena: CallArena, where: str) -> Any:
    try:
        return value.handle
    except FiFfiError:
        got = f"a {type(value).__name__} that was released"
    raise ArgumentError(arena.op, where, got=got, expected="an object still held")


def object_packer(name: str, *indices: int) -> Packer:
    """Return a packer of owned objects, of any type or of libtvm_ffi's types in `indices`."""

    def packer(slot: Any, value: Any, arena: CallArena, where: str) -> None:
        if not issubclass(type(value), Object):
            refuse(value, arena, where, f"an object of type {name}")
        handle = _handle(value, arena, where)
        # The header's index, not the wrapper's, since C++ may define subclasses of Object.
        index = library.type_index_of(handle)
        if indices and index not in indices:
            refuse(value, arena, where, f"an object of type {name}")
        slot.type_index, slot.v_ptr = index, handle
        arena.keep.append(handle)
        arena.depth = max(arena.depth, arena.level + value.depth)

    return packer


pack_object = object_packer("ffi.Object")
_OWN_TYPES: dict[type, Packer] = {
    type(None): pack_none,
    DType: pack_dtype,
    TensorDesc: pack_tensor,
}


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
    handle = slot.v_ptr
    made = slot.v_obj.type_index if handle else _pointed(slot, "void *")
    if made != index:  # not released either: its real type is unknown
        raise AbiError(f"a TVM-FFI value of type index {index}, its object of {made}")
    if not owned:
        library.lib.TVMFFIObjectIncRef(handle)
    value = OBJECT_TYPES.get(index, Object)(handle)
    if index in _TEXTS:
        with value:
            found = bytes_of(value)
        return found if index == TypeIndex.BYTES else found.decode(errors="replace")
    return value


def _pointed(slot: Any, kind: str) -> Any:
    if slot.v_ptr == ffi.NULL:
        raise AbiError(f"a TVM-FFI value of type index {slot.type_index} that is a null pointer")
    return ffi.cast(kind, slot.v_ptr)


def _read_dtype(slot: Any) -> DType:
    dtype, code = dtype_of(slot.v_dtype), slot.v_dtype
    if dtype is None:
        fields = f"{code.code}:{code.bits}:{code.lanes}"
        raise AbiError(f"a value that is a dtype fi_ffi does not know: {fields}")
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
    name: str,
    function: Callable[..., Any],
    signature: Signature | None = None,
    adopt: Callable[[Any], Any] | None = None,
    pack_result: Packer = pack,
) -> Function:
    """Return a Function object that calls a Python function; an exception becomes a TVM-FFI error.

    With a signature, the function refuses a wrong argument count with the message of a compiled
    one, so that `probe` reads the signature. `adopt` converts the objects among the arguments.
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
            # The result must own its memory, unlike an argument.
            arena.is_result = True
            view = ffi.new("TVMFFIAny *")
            pack_result(view[0], value, arena, "result")
            check(library.lib.TVMFFIAnyViewToOwnedAny(view, owned), name)
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
    return Function(slot[0], callback)


def _argument(slot: Any, adopt: Callable[[Any], Any] | None) -> Any:
    value = unpack(slot, owned=False)
    if isinstance(value, Tensor):
        return value.described()
    return value if adopt is None else adopt(value)
