"""Descriptors of other libraries' tensors, without importing those libraries.

A tensor is anything that is a `TensorDesc`, a numpy array, or an object with
`__dlpack__`, `__cuda_array_interface__` or `__array_interface__`.  Nothing is
copied and nothing synchronised: ordering is what `stream=` is for.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, Protocol, TypeAlias

from fi_ffi.abi import device_errors
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, device_from_code, parse_device
from fi_ffi.abi.dtypes import DTYPES, DType, dtype_from_code
from fi_ffi.abi.failure import message_of
from fi_ffi.abi.library import c_library
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.abi.values import dims_of
from fi_ffi.errors import ArgumentError, ArgumentTypeError, DeviceError, printed


class SupportsDLPack(Protocol):
    """An exporter of DLPack capsules."""

    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(self, *, stream: Any = None) -> object: ...


class SupportsCudaArrayInterface(Protocol):
    """Numba's protocol for arrays on a GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class SupportsArrayInterface(Protocol):
    """numpy's protocol for arrays on the host."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


TensorLike: TypeAlias = (
    TensorDesc | SupportsDLPack | SupportsCudaArrayInterface | SupportsArrayInterface
)

_CAPSULES = {b"dltensor": "DLManagedTensor *", b"dltensor_versioned": "DLManagedTensorVersioned *"}
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_NO_SYNC = -1  # DLPack: the consumer orders its work itself
_TENSOR = "a TensorDesc, or an object with __dlpack__ or a (CUDA) array interface"

# numpy's array-interface kinds; 'V' (no kind) is not among them.
_TYPESTR = {"f": "float", "i": "int", "u": "uint", "b": "bool"}


def as_desc(value: object, op: str = "as_desc", argument: str = "value") -> TensorDesc:
    """The descriptor of any tensor; the object itself is kept alive with it.

    Raises `ArgumentTypeError` for what is no tensor, `ArgumentError` for one that
    cannot be described (an unknown dtype, an unsupported device).
    """
    if isinstance(value, TensorDesc):
        return value
    # Looked up on the type: numpy, torch and cupy do the same for protocols.
    kind = type(value)
    try:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            return _from_array_interface(value, value.__array_interface__, op, argument, "cpu")
        if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
            return _from_dlpack(value, op, argument)
        if hasattr(kind, "__cuda_array_interface__"):
            interface = value.__cuda_array_interface__  # type: ignore[attr-defined]
            device = _cuda_device_of(interface["data"][0])
            return _from_array_interface(value, interface, op, argument, device)
        if hasattr(kind, "__array_interface__"):
            interface = value.__array_interface__  # type: ignore[attr-defined]
            return _from_array_interface(value, interface, op, argument, "cpu")
    except (ArgumentError, DeviceError, MemoryError):
        raise
    except Exception as error:  # the exporter refused: say whose words these are
        got = f"a {kind.__module__}.{kind.__qualname__} that refused: {message_of(error)}"
        raise ArgumentError(op, argument, got=got, expected="an exportable tensor") from error
    got = f"{kind.__module__}.{kind.__qualname__} {printed(value)}"
    raise ArgumentTypeError(op, argument, got=got, expected=_TENSOR)


def _from_array_interface(
    value: Any, interface: dict[str, Any], op: str, argument: str, device: object
) -> TensorDesc:
    ptr, readonly = interface["data"]
    dtype = _array_dtype(value, interface["typestr"], op, argument)
    strides = interface.get("strides")
    if strides is not None:
        if any(step % dtype.itemsize for step in strides):
            got = f"strides of {tuple(strides)} bytes"
            expected = f"multiples of {dtype}'s {dtype.itemsize} bytes"
            raise ArgumentError(op, argument, got=got, expected=expected)
        strides = tuple(step // dtype.itemsize for step in strides)
    layout = make_layout(interface["shape"], dtype, strides, device, bool(readonly))
    # The interface too: what it was made from may be held by nothing else (numpy's scalars).
    return make_desc(ptr or 0, layout, (value, interface))


def _array_dtype(value: Any, typestr: str, op: str, argument: str) -> DType:
    kind = _TYPESTR.get(typestr[1], "") if len(typestr) > 2 and typestr[0] != ">" else ""
    name = kind if kind in ("", "bool") else f"{kind}{8 * int(typestr[2:])}"
    if name not in DTYPES and typestr[0] != ">":
        # ml_dtypes' types have no kind of their own here; the dtype's name tells them.
        name = str(getattr(getattr(value, "dtype", None), "name", ""))
    if name not in DTYPES:
        got = f"dtype {getattr(value, 'dtype', typestr)}"
        raise ArgumentError(op, argument, got=got, expected=f"one of {list(DTYPES)}")
    return DTYPES[name]


def _from_dlpack(value: Any, op: str, argument: str) -> TensorDesc:
    type_code, index = value.__dlpack_device__()
    device = device_from_code(int(type_code), int(index))
    if device is None:
        got = f"DLPack device {int(type_code)}:{int(index)}"
        raise ArgumentError(op, argument, got=got, expected="a CPU or CUDA tensor")
    capsule = _export(value, {"stream": _NO_SYNC} if device.is_cuda else {})
    tensor, readonly = _open_capsule(capsule)
    told = tensor.device
    if told.device_type != type_code or told.device_id != index:
        _check_device(device, told.device_type, told.device_id, op, argument)
    dtype = dtype_from_code(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    if dtype is None:
        got = f"DLPack dtype {tensor.dtype.code}:{tensor.dtype.bits}:{tensor.dtype.lanes}"
        raise ArgumentError(op, argument, got=got, expected=f"one of {list(DTYPES)}")
    shape, strides = dims_of(tensor)
    address = int(ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
    layout = make_layout(shape, dtype, strides, device, readonly)
    # The capsule stays unconsumed: it and the tensor live as long as the descriptor,
    # and its own destructor gives the export back.
    return make_desc(address, layout, (value, capsule))


def _check_device(device: Device, type_code: int, index: int, op: str, argument: str) -> None:
    """Refuse a capsule of another device than its exporter told.

    Exporters differ on which kind of host memory it is, and whether a GPU's is managed.
    """
    there = device_from_code(type_code, index)
    if there is not None:
        kinds = {device.type, there.type}
        if kinds <= {"cpu", "cuda_host"}:
            return
        if kinds == {"cuda", "cuda_managed"} and device.index == there.index:
            return
    got = f"a capsule of device {type_code}:{index}"
    raise ArgumentError(op, argument, got=got, expected=f"{device}, as its exporter told")


def _export(value: Any, no_sync: dict[str, int]) -> object:
    """A DLPack capsule, as new a one as the exporter can make."""
    try:
        return value.__dlpack__(max_version=(1, 0), **no_sync)
    except Exception:
        # From before DLPack 1.0, or one that cannot leave ordering to us (jax takes -1
        # for a stream): its own default then, which is to order itself.
        return value.__dlpack__()


def _open_capsule(capsule: object) -> tuple[Any, bool]:
    """The `DLTensor` inside a DLPack capsule, and whether it is read-only.

    `PyCapsule_GetPointer` is Python's own C function, called without the GIL.
    That is safe while it succeeds (it compares the name and returns a field) and
    not when it fails (it would set an exception), so the name is checked first:
    a capsule's repr is the one place where Python code can read it.
    """
    parts = repr(capsule).split('"') if type(capsule) is _capsule_type() else []
    name = parts[1].encode() if len(parts) == 3 else b""
    if name not in _CAPSULES:
        raise TypeError(f"__dlpack__ returned {printed(capsule)}, not a fresh DLPack capsule")
    pointer = c_library().PyCapsule_GetPointer(ffi.cast("void *", id(capsule)), name)
    managed = ffi.cast(_CAPSULES[name], pointer)
    if name == b"dltensor":
        return managed.dl_tensor, False
    if managed.version.major != 1:
        raise TypeError(f"DLPack version {managed.version.major}, not 1")
    return managed.dl_tensor, bool(managed.flags & _READ_ONLY)


@functools.cache
def _capsule_type() -> type:
    """The type of capsules, which Python names from 3.13 on only; by that of one it has itself."""
    return type(importlib.import_module("_datetime").datetime_CAPI)


def _cuda_device_of(ptr: int | None) -> Device:
    """The device an address belongs to: the CUDA array interface does not say."""
    if not ptr:
        return parse_device("cuda:0")
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    driver.cuInit(0)
    error, ordinal = driver.cuPointerGetAttribute(attribute, ptr)
    if int(error) in device_errors.STICKY:
        raise device_errors.lost("cuPointerGetAttribute", int(error))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"the CUDA driver does not know address {ptr:#x} ({error.name})")
    return parse_device(f"cuda:{ordinal}")
