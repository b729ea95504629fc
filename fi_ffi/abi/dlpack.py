"""DLPack's structures: `DLTensor`s read and written, and capsules opened."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import (
    DTYPES,
    MAX_RANK,
    Device,
    TensorDesc,
    TensorKind,
    c_strides,
    checked,
    device_from_code,
    dtype_of,
    tensor_kind,
)
from fi_ffi.errors import AbiError, ArgumentError, printed

_CAPSULES = {b"dltensor": "DLManagedTensor *", b"dltensor_versioned": "DLManagedTensorVersioned *"}
_READ_ONLY, _PADDED = 1 << 0, 1 << 2  # DLPACK_FLAG_BITMASK_READ_ONLY and _IS_SUBBYTE_TYPE_PADDED


def write_dl_tensor(tensor: Any, desc: TensorDesc, dims: Any = None) -> Any:
    """Fill a `DLTensor`; return the array of sizes and strides, which must outlive it."""
    words = 2 * desc.kind.rank
    if dims is None:
        dims = ffi.new("int64_t[]", words)
    dims[0:words] = desc.shape + desc.strides
    tensor.data, tensor.byte_offset = ffi.cast("void *", desc.ptr), 0
    write_kind(tensor, desc.kind, dims)
    return dims


def write_kind(tensor: Any, kind: TensorKind, dims: Any) -> None:
    """Write a `DLTensor`'s device, dtype and rank; `dims` holds its sizes and strides."""
    device, dtype, rank = kind.device, kind.dtype, kind.rank
    place, written = tensor.device, tensor.dtype
    place.device_type, place.device_id = device.type_code, device.index
    written.code, written.bits, written.lanes = dtype.code, dtype.bits, dtype.lanes
    tensor.ndim, tensor.shape, tensor.strides = rank, dims, dims + rank


def desc_from_dl_tensor(tensor: Any, owner: object = None) -> TensorDesc:
    """Describe a `DLTensor` and keep its `owner`; `AbiError` if it cannot be described."""
    place = tensor.device
    device = device_from_code(place.device_type, place.device_id)
    if device is None:
        raise AbiError("a DLTensor of a dtype or device that fi_ffi does not know")
    try:
        return read_dl_tensor(tensor, device, owner)
    except ArgumentError as error:
        raise AbiError(f"a DLTensor that is invalid: {error}") from None


def read_dl_tensor(
    tensor: Any, device: Device, owner: object, readonly: bool = False
) -> TensorDesc:
    """Describe a `DLTensor` on this device; `ArgumentError` if it cannot be described."""
    dtype = dtype_of(tensor.dtype)
    if dtype is None:
        got = f"DLPack dtype {tensor.dtype.code}:{tensor.dtype.bits}:{tensor.dtype.lanes}"
        raise ArgumentError("DLTensor", "dtype", got=got, expected=f"one of {list(DTYPES)}")
    shape, strides = dims_of(tensor)
    if min(shape, default=0) < 0:
        raise ArgumentError("DLTensor", "shape", got=shape, expected="sizes of 0 or more")
    steps = c_strides(shape) if strides is None else strides
    address = library.address_of(tensor.data) + tensor.byte_offset
    return checked(address, shape, steps, tensor_kind(dtype, device, len(shape), readonly), owner)


def dims_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return a `DLTensor`'s shape and strides; strides are None if it has none."""
    rank = tensor.ndim
    if not rank:
        return (), None
    # Check the rank before reading: the arrays may be shorter.
    if not 0 < rank <= MAX_RANK:
        raise AbiError(f"a DLTensor of {rank} dimensions")
    sizes, steps = tensor.shape, tensor.strides
    if sizes == ffi.NULL:
        raise AbiError(f"a DLTensor of {rank} dimensions without a shape")
    return tuple(sizes[0:rank]), tuple(steps[0:rank]) if steps else None


def open_capsule(capsule: object) -> tuple[Any, bool]:
    """Return the `DLTensor` inside a DLPack capsule, and whether it is read-only.

    `PyCapsule_GetPointer`, a function of Python's C API, is called without the GIL. A successful
    call is safe (it compares the name and returns a field); a failing call is not (it sets an
    exception). Therefore the name is checked first, in the capsule's repr, the only place where
    Python code can read it.
    """
    parts = repr(capsule).split('"') if type(capsule) is _capsule_type() else []
    name = parts[1].encode() if len(parts) == 3 else b""
    if name not in _CAPSULES:
        raise TypeError(f"__dlpack__ returned {printed(capsule)}, not a fresh DLPack capsule")
    pointer = library.c_library.PyCapsule_GetPointer(ffi.cast("void *", id(capsule)), name)
    managed = ffi.cast(_CAPSULES[name], pointer)
    if name == b"dltensor":
        return managed.dl_tensor, False
    if managed.version.major != 1:
        raise TypeError(f"DLPack version {managed.version.major}, not 1")
    if managed.flags & _PADDED:
        raise TypeError("elements smaller than a byte with a byte for each, not packed")
    return managed.dl_tensor, bool(managed.flags & _READ_ONLY)


@functools.cache
def _capsule_type() -> type:
    """Return the type of capsules, taken from a capsule, as Python < 3.13 does not name it."""
    return type(importlib.import_module("_datetime").datetime_CAPI)
