"""Single values into and out of a `TVMFFIAny`.

Kernel calls have their own packed frames (frame.py); this is the general way,
for function objects, arrays, and what kernels return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_ffi.abi import library, types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, device_from_code
from fi_ffi.abi.dtypes import DType, dtype_from_code
from fi_ffi.abi.failure import check
from fi_ffi.abi.objects import OBJECT_TYPES, Object, String, write_dl_tensor
from fi_ffi.abi.tensor import MAX_RANK, TensorDesc, make_desc, make_layout
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, printed

_SMALL = 8  # bytes in a `TVMFFIAny` itself
_PACKABLE = "None, bool, int, float, str, bytes, a DType, Device, TensorDesc or owned Object"


def pack(slot: Any, value: object, keep: list[object], op: str, argument: str) -> None:
    """Write `value` into a zeroed `TVMFFIAny`; `keep` must outlive the call."""
    packer = _PACKERS.get(type(value))
    if packer is None:
        if isinstance(value, Object):
            # The header's own index, not the wrapper's: subclasses of Object in C++.
            header = ffi.cast("TVMFFIObject *", value.handle)
            slot.type_index, slot.v_ptr = header.type_index, value.handle
            return
        got = f"{type(value).__name__} {printed(value)}"
        raise ArgumentTypeError(op, argument, got=got, expected=_PACKABLE)
    try:
        packer(slot, value, keep)
    except OverflowError:
        raise ArgumentError(op, argument, got=value, expected="an int64") from None
    except UnicodeEncodeError:
        got = f"{printed(value)}, with a lone surrogate"
        raise ArgumentError(op, argument, got=got, expected="text that UTF-8 has") from None


def _pack_none(slot: Any, value: None, keep: list[object]) -> None:
    slot.type_index = types.NONE


def _pack_bool(slot: Any, value: bool, keep: list[object]) -> None:
    slot.type_index, slot.v_int64 = types.BOOL, value


def _pack_int(slot: Any, value: int, keep: list[object]) -> None:
    slot.type_index, slot.v_int64 = types.INT, value


def _pack_float(slot: Any, value: float, keep: list[object]) -> None:
    slot.type_index, slot.v_float64 = types.FLOAT, value


def _pack_str(slot: Any, value: str, keep: list[object]) -> None:
    encoded = value.encode()
    if b"\0" not in encoded:
        text = ffi.new("char[]", encoded)
        keep.append(text)
        slot.type_index, slot.v_c_str = types.RAW_STR, text
        return
    # A C string would end at the NUL; the library's own strings know their length.
    array, _buffer = library.byte_array(encoded)
    check(library.lib.TVMFFIStringFromByteArray(array, ffi.addressof(slot)), "str")
    if slot.type_index == types.STR:
        keep.append(String(slot.v_ptr))


def _pack_bytes(slot: Any, value: bytes, keep: list[object]) -> None:
    array, buffer = library.byte_array(value)
    keep += (array, buffer)
    slot.type_index, slot.v_ptr = types.BYTE_ARRAY_PTR, array


def _pack_dtype(slot: Any, value: DType, keep: list[object]) -> None:
    slot.type_index = types.DATA_TYPE
    slot.v_dtype.code, slot.v_dtype.bits, slot.v_dtype.lanes = value.code, value.bits, value.lanes


def _pack_device(slot: Any, value: Device, keep: list[object]) -> None:
    slot.type_index = types.DEVICE
    slot.v_device.device_type, slot.v_device.device_id = value.type_code, value.index


def _pack_desc(slot: Any, value: TensorDesc, keep: list[object]) -> None:
    tensor = ffi.new("DLTensor *")
    write_dl_tensor(tensor, value)
    keep += (tensor, value)
    slot.type_index, slot.v_ptr = types.DL_TENSOR_PTR, tensor


_PACKERS: dict[type, Callable[[Any, Any, list[object]], None]] = {
    type(None): _pack_none,
    bool: _pack_bool,
    int: _pack_int,
    float: _pack_float,
    str: _pack_str,
    bytes: _pack_bytes,
    DType: _pack_dtype,
    Device: _pack_device,
    TensorDesc: _pack_desc,
}


def unpack(slot: Any, *, owned: bool) -> Any:
    """The Python value of a `TVMFFIAny`.

    `owned` says that the slot holds a reference (a call's result): it is taken
    over, and must not be used from the slot again.  Otherwise (an argument of a
    callback) objects are borrowed and get a reference of their own.
    """
    index = slot.type_index
    reader = _READERS.get(index)
    if reader is not None:
        return reader(slot)
    if index < types.OBJECT_BEGIN:
        raise AbiError(f"a TVM-FFI value of type index {index} has no Python form")
    check_object(slot, index)
    if not owned:
        library.lib.TVMFFIObjectIncRef(slot.v_ptr)
    value = OBJECT_TYPES.get(index, Object)(slot.v_ptr)
    if index == types.STR:
        with value:
            return str(value)
    if index == types.BYTES:
        with value:
            return library.read_bytes(ffi.cast("FiFfiBytesObject *", value.handle).cell)
    return value


def check_object(slot: Any, index: int) -> None:
    """`AbiError` unless a value of an object's type index has such an object.

    One that is refused is not released: what it is cannot be told.
    """
    made = slot.v_obj
    if made == ffi.NULL:
        raise AbiError(f"a TVM-FFI value of type index {index} that is a null pointer")
    if made.type_index != index:
        raise AbiError(f"a TVM-FFI value of type index {index}, its object of {made.type_index}")


def desc_from_dl_tensor(tensor: Any) -> TensorDesc:
    """The descriptor of a `DLTensor` that somebody else keeps alive; `AbiError` for nonsense."""
    dtype = dtype_from_code(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    device = device_from_code(tensor.device.device_type, tensor.device.device_id)
    if dtype is None or device is None:
        raise AbiError("a DLTensor of a dtype or device that fi_ffi does not know")
    shape, strides = dims_of(tensor)
    address = int(ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
    try:
        return make_desc(address, make_layout(shape, dtype, strides, device, False))
    except ArgumentError as error:
        raise AbiError(f"a DLTensor that no tensor can be: {error}") from error


def dims_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shape and strides of a `DLTensor`, the latter None where it has none."""
    rank = tensor.ndim
    if not rank:
        return (), None
    # Before anything is read: an array of that length may not be there.
    if not 0 < rank <= MAX_RANK:
        raise AbiError(f"a DLTensor of {rank} dimensions")
    sizes, steps = tensor.shape, tensor.strides
    if sizes == ffi.NULL:
        raise AbiError(f"a DLTensor of {rank} dimensions without a shape")
    return tuple(sizes[0:rank]), tuple(steps[0:rank]) if steps else None


def ints_of(cell: Any) -> tuple[int, ...]:
    """What a `TVMFFIShapeCell` names."""
    if not cell.size:
        return ()
    if cell.data == ffi.NULL or cell.size > library.MAX_BYTES // 8:
        raise AbiError(f"an ffi.Shape of {cell.size} ints that cannot be")
    return tuple(cell.data[0 : cell.size])


def _read_dtype(slot: Any) -> DType:
    code, bits, lanes = slot.v_dtype.code, slot.v_dtype.bits, slot.v_dtype.lanes
    dtype = dtype_from_code(code, bits, lanes)
    if dtype is None:
        raise AbiError(f"a value that is a dtype fi_ffi does not know: {code}:{bits}:{lanes}")
    return dtype


def _read_device(slot: Any) -> Device:
    device = device_from_code(slot.v_device.device_type, slot.v_device.device_id)
    if device is None:
        raise AbiError(f"a value that is a device of type {slot.v_device.device_type}")
    return device


def _read_small(slot: Any) -> bytes:
    if slot.small_str_len > _SMALL:
        raise AbiError(f"an inline string of {slot.small_str_len} bytes, where {_SMALL} have room")
    return bytes(ffi.buffer(slot.v_bytes, slot.small_str_len))


def _pointed(slot: Any, kind: str) -> Any:
    if slot.v_ptr == ffi.NULL:
        raise AbiError(f"a TVM-FFI value of type index {slot.type_index} that is a null pointer")
    return ffi.cast(kind, slot.v_ptr)


_READERS: dict[int, Callable[[Any], Any]] = {
    types.NONE: lambda slot: None,
    types.INT: lambda slot: slot.v_int64,
    types.BOOL: lambda slot: slot.v_int64 != 0,
    types.FLOAT: lambda slot: slot.v_float64,
    types.OPAQUE_PTR: lambda slot: int(ffi.cast("uintptr_t", slot.v_ptr)),
    types.DATA_TYPE: _read_dtype,
    types.DEVICE: _read_device,
    types.DL_TENSOR_PTR: lambda slot: desc_from_dl_tensor(_pointed(slot, "DLTensor *")),
    types.RAW_STR: lambda slot: ffi.string(_pointed(slot, "char *")).decode(errors="replace"),
    types.BYTE_ARRAY_PTR: lambda slot: library.read_bytes(_pointed(slot, "TVMFFIByteArray *")),
    types.SMALL_STR: lambda slot: _read_small(slot).decode(errors="replace"),
    types.SMALL_BYTES: lambda slot: _read_small(slot),
}
