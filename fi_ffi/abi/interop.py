"""Descriptors of other libraries' tensors, made without importing those libraries.

A tensor is a `TensorDesc`, a numpy array, or an object with `__dlpack__`,
`__cuda_array_interface__` or `__array_interface__`. Nothing is copied and nothing is synchronised:
`stream=` orders the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeAlias

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import open_capsule, read_dl_tensor
from fi_ffi.abi.failure import STICKY, lost, message_of
from fi_ffi.abi.objects import Tensor
from fi_ffi.abi.tensor import (
    DTYPES,
    Device,
    DType,
    Made,
    TensorDesc,
    TensorKind,
    c_strides,
    device_from_code,
    frozen,
    make_desc,
    parse_device,
    remember,
    tensor_kind,
)
from fi_ffi.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    let_through,
    printed,
    type_name,
    with_type,
)


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

_new = object.__new__
_NO_SYNC = -1  # DLPack: the consumer orders the work itself
_PLAIN = "a dense tensor with memory of its own on a CPU or CUDA device"
_TENSOR = "a TensorDesc, or an object with __dlpack__ or a (CUDA) array interface"

# Kinds of numpy's array interface; 'V' (void) has no dtype here.
_TYPESTR = {"f": "float", "i": "int", "u": "uint", "b": "bool"}


# What a `TensorDesc` has: address, shape, strides, kind, and what keeps the memory alive.
Fields: TypeAlias = "tuple[int, tuple[int, ...], tuple[int, ...], TensorKind, object]"
Adapter = Callable[[Any, str, str], TensorDesc]
Reader = Callable[[Any, str, str], Fields]

# By type, what reads a tensor of a kind seen before without a descriptor; of all other tensors it
# leaves the judgement to `read`. A tensor whose type is not here is read by `read`.
READERS: dict[type, Reader] = {}


def as_desc(value: object, op: str = "as_desc", argument: str = "value") -> TensorDesc:
    """Describe any tensor.  The descriptor keeps the object alive.

    Raises `ArgumentTypeError` for an object that is not a tensor, and `ArgumentError` for a tensor
    with an unknown dtype or device.
    """
    kind = type(value)
    if kind is TensorDesc:
        return value  # type: ignore[return-value]
    made: Any = _new(Made)
    made.ptr, made.shape, made.strides, made.kind, made.owner = READERS.get(kind, read)(
        value, op, argument
    )
    made.__class__ = TensorDesc
    return made  # type: ignore[no-any-return]


def read(value: object, op: str, argument: str) -> Fields:
    """Return the fields of a descriptor of any tensor, as `as_desc` makes it."""
    desc = _describe(value, op, argument)
    return desc.ptr, desc.shape, desc.strides, desc.kind, desc.owner


def described(tensor: TensorDesc | Fields | None) -> Any:
    """Return a descriptor of what was read of a tensor; None of a missing one."""
    return frozen(*tensor) if type(tensor) is tuple else tensor


def _describe(value: object, op: str, argument: str) -> TensorDesc:
    kind = type(value)
    adapter = _ADAPTERS.get(kind)
    if adapter is None:
        adapter = _adapter_of(kind)
        if adapter is None:
            got = with_type(value)
            raise ArgumentTypeError(op, argument, got=got, expected=_TENSOR)
    try:
        return adapter(value, op, argument)
    except ArgumentError as error:
        if error.op == op:
            raise
        # raised while making the descriptor: name the caller's op and argument
        made = error.of(op, argument)
    except (DeviceError, MemoryError):
        raise
    except Exception as error:  # the exporter failed: attribute the message to it
        got = f"a {type_name(kind)} that refused: {message_of(error)}"
        raise ArgumentError(op, argument, got=got, expected="an exportable tensor") from error
    raise made


# Adapters that read tensors, cached by type.
_ADAPTERS: dict[type, Adapter] = {}
_MAX_TYPES = 256


def _adapter_of(kind: type) -> Adapter | None:
    """Return the adapter for a type: its library's adapter, or else a protocol's."""
    found: Adapter | None = None
    if issubclass(kind, Tensor):  # also a Tensor that a call returned
        return remember(_ADAPTERS, kind, lambda value, *_: value.described(), _MAX_TYPES)
    for base in kind.__mro__:
        make = _LIBRARIES.get((base.__module__, base.__qualname__))
        # Another library's type of the same name is read through its protocols only.
        library = sys.modules.get(base.__module__)
        if make is not None and getattr(library, base.__name__, None) is base:
            found = make(kind, library)
            break
    if found is None:
        found = _protocol_of(kind)
    return found if found is None else remember(_ADAPTERS, kind, found, _MAX_TYPES)


def _protocol_of(kind: type) -> Adapter | None:
    # Look the protocols up on the type, as numpy, torch and cupy do. DLPack comes first: it alone
    # reports the layout that XLA chose for a jax array.
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _from_dlpack
    if hasattr(kind, "__cuda_array_interface__"):
        return _from_cuda_array_interface
    if hasattr(kind, "__array_interface__"):
        return lambda value, op, argument: _from_array_interface(
            value, value.__array_interface__, op, argument, "cpu"
        )
    return None


def _numpy_adapter(kind: type, library: Any) -> Adapter:
    """Read contiguous arrays by attributes, all others by their array interface."""
    if _has_mask(kind):
        return _refuse_masked
    kinds: dict[tuple[Any, int], TensorKind] = {}
    from_buffer, cast = ffi.from_buffer, ffi.cast

    def read_known(array: Any, op: str, argument: str) -> Fields:
        try:
            flags = array.flags
            if flags.c_contiguous and flags.writeable:
                shape = array.shape
                found = kinds[array.dtype, len(shape)]
                address = int(cast("uintptr_t", from_buffer(array)))
                return address, shape, c_strides(shape), found, array
        except Exception as error:
            let_through(error)
        return read(array, op, argument)

    def describe(array: Any, op: str, argument: str) -> TensorDesc:
        desc = _from_array_interface(array, array.__array_interface__, op, argument, "cpu")
        if not desc.readonly:
            remember(kinds, (array.dtype, len(desc.shape)), desc.kind, _MAX_TYPES)
        return desc

    remember(READERS, kind, read_known, _MAX_TYPES)
    return describe


def _has_mask(kind: type) -> bool:
    arrays: Any = getattr(sys.modules.get("numpy"), "ndarray", ())
    return issubclass(kind, arrays) and hasattr(kind, "mask")


def _refuse_masked(value: object, op: str, argument: str) -> NoReturn:
    got = f"a {type_name(type(value))}, of which a mask hides elements"
    expected = "an array without a mask: x.filled(value), or x.data for all elements"
    raise ArgumentError(op, argument, got=got, expected=expected)


def check_unmasked(value: object, op: str, argument: str) -> None:
    """Refuse an array with a mask, which whoever reads the elements would not see."""
    if _has_mask(type(value)):
        _refuse_masked(value, op, argument)


def _torch_adapter(kind: type, torch: Any) -> Adapter:
    """Read a tensor by attributes, without exporting it; refuse those that no kernel can read."""
    # By dtype, device and rank, with whether the tensor may be a view of the negative elements.
    kinds: dict[tuple[Any, Any, int], tuple[TensorKind, bool]] = {}
    strided = torch.strided
    # an index then belongs to a CUDA GPU; other builds have several kinds of device
    has_cuda_only = torch.version.cuda is not None
    is_plain_type = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]

    def read_known(tensor: Any, op: str, argument: str) -> Fields:
        try:
            # A tensor that is not dense raises when asked for its strides. Those and the shape are
            # read in every call: a tensor of inference_mode() has no version that tells of a
            # change, and an identity may be another tensor's by now.
            strides = tensor.stride()
            # Without an index the device may be of several kinds.
            where = tensor.get_device() if has_cuda_only else -1
            if where < 0:
                where = tensor.device
            found, may_be_negative = kinds[tensor.dtype, where, len(strides)]
            if not (may_be_negative and tensor.is_neg()):
                return tensor.data_ptr(), tensor.shape, strides, found, tensor
        except Exception as error:  # of a kind not seen yet, or of a tensor that refused
            let_through(error)
        return read(tensor, op, argument)

    def describe(tensor: Any, op: str, argument: str) -> TensorDesc:
        """Describe a tensor and keep what is not of this one alone; raise if no kernel can read
        it."""
        what = f"a {type_name(kind)}, which stands for a tensor"
        if is_plain_type:
            what = _unreadable(tensor, strided)
        if what:
            raise ArgumentError(op, argument, got=what, expected=_PLAIN)
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        # torch has only names for these, not their elements
        if dtype is None or dtype.shares_bytes:
            expected = f"one of {list(DTYPES)}"
            raise ArgumentError(op, argument, got=f"dtype {tensor.dtype}", expected=expected)
        where = tensor.device
        if where.type not in ("cpu", "cuda"):
            raise ArgumentError(op, argument, got=where, expected="a CPU or CUDA tensor")
        device = parse_device(f"{where.type}:{where.index or 0}" if where.type == "cuda" else "cpu")
        made = frozen(
            tensor.data_ptr(), tensor.shape, tensor.stride(),
            tensor_kind(dtype, device, tensor.dim()), tensor,
        )  # fmt: skip
        named = tensor.get_device() if where.type == "cuda" and has_cuda_only else where
        key = tensor.dtype, named, tensor.dim()
        remember(kinds, key, (made.kind, dtype.name in _MAY_BE_NEGATIVE), _MAX_TYPES)
        return made

    remember(READERS, kind, read_known, _MAX_TYPES)
    return describe


# The dtypes of complex tensors' parts: torch's conj().imag is a view with the sign turned.
_MAY_BE_NEGATIVE = ("float16", "float32", "float64")


def _unreadable(tensor: Any, strided: object) -> str:
    """Say what a torch tensor is whose memory no kernel can read; "" for all others."""
    if tensor.layout is not strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.device.type == "meta":
        return "a meta tensor, which has no memory"
    if tensor.is_conj() or tensor.is_neg():
        view, to = ("conjugate", "conj") if tensor.is_conj() else ("negative", "neg")
        return f"a {view} view, whose memory has other values: see torch.resolve_{to}"
    return ""


def _cupy_adapter(kind: type, library: Any) -> Adapter:
    """Read an array by attributes; its strides are in bytes."""

    def read(array: Any, op: str, argument: str) -> TensorDesc:
        data, shape, itemsize = array.data, array.shape, array.itemsize
        key = array.dtype, data.device_id, len(shape)
        found = kinds.get(key)
        if found is None:
            dtype = _array_dtype(array, array.dtype.str, op, argument)
            device = parse_device(f"cuda:{data.device_id}")
            found = remember(kinds, key, tensor_kind(dtype, device, len(shape)), _MAX_TYPES)
        strides = tuple([step // itemsize for step in array.strides])
        if any(step % itemsize for step in array.strides):
            raise _odd_strides(op, argument, array.strides, found.dtype)
        return frozen(data.ptr, shape, strides, found, array)

    kinds: dict[tuple[Any, int, int], TensorKind] = {}
    return read


# Adapter factories, by the module and name of the array type or of a base class.
_LIBRARIES: dict[tuple[str, str], Callable[[type, Any], Adapter]] = {
    ("fi_ffi.abi.tensor", "TensorDesc"): lambda *_: lambda desc, *_: desc.at(desc.ptr, desc.owner),
    ("numpy", "ndarray"): _numpy_adapter,
    ("torch", "Tensor"): _torch_adapter,
    ("cupy", "ndarray"): _cupy_adapter,
    ("numba.cuda.cudadrv.devicearray", "DeviceNDArrayBase"): lambda *_: _from_cuda_array_interface,
}


def _from_cuda_array_interface(value: Any, op: str, argument: str) -> TensorDesc:
    interface = value.__cuda_array_interface__
    device = _cuda_device_of(_pointer_of(interface)[0])
    return _from_array_interface(value, interface, op, argument, device)


def _pointer_of(interface: dict[str, Any]) -> tuple[Any, Any]:
    """Return an interface's address and its read-only flag."""
    data = interface["data"]
    # numpy's protocol also allows a buffer here, whose bytes would be unpacked as the two values.
    if type(data) is not tuple or len(data) != 2:
        raise TypeError(f"its interface's data is {printed(data)}, not an address and a flag")
    return data


def _from_array_interface(
    value: Any, interface: dict[str, Any], op: str, argument: str, device: object
) -> TensorDesc:
    if interface.get("mask") is not None:
        _refuse_masked(value, op, argument)
    ptr, readonly = _pointer_of(interface)
    dtype = _array_dtype(value, interface["typestr"], op, argument)
    strides = interface.get("strides")
    if strides is not None:
        if any(step % dtype.itemsize for step in strides):
            raise _odd_strides(op, argument, strides, dtype)
        strides = tuple(step // dtype.itemsize for step in strides)
    # Keep the interface too: it may be the only reference to the memory (numpy's scalars).
    owner = value, interface
    return make_desc(ptr or 0, interface["shape"], dtype, strides, device, bool(readonly), owner)


def _odd_strides(op: str, argument: str, strides: Any, dtype: DType) -> ArgumentError:
    got = f"strides of {tuple(strides)} bytes"
    expected = f"multiples of {dtype}'s {dtype.itemsize} bytes"
    return ArgumentError(op, argument, got=got, expected=expected)


def _array_dtype(value: Any, typestr: str, op: str, argument: str) -> DType:
    kind = _TYPESTR.get(typestr[1], "") if len(typestr) > 2 and typestr[0] != ">" else ""
    name = kind if kind in ("", "bool") else f"{kind}{8 * int(typestr[2:])}"
    if name not in DTYPES and typestr[0] != ">":
        # The interface has no kind for ml_dtypes' types; the dtype's name identifies them.
        name = str(getattr(getattr(value, "dtype", None), "name", ""))
    # numpy stores a byte for each of their elements
    if name not in DTYPES or DTYPES[name].shares_bytes:
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
    tensor, readonly = open_capsule(capsule)
    actual = tensor.device
    if actual.device_type != type_code or actual.device_id != index:
        _check_device(device, actual.device_type, actual.device_id, op, argument)
    # The capsule is not consumed: it lives as long as the descriptor, and its own destructor
    # returns the export.
    return read_dl_tensor(tensor, device, (value, capsule), readonly)


def _check_device(device: Device, type_code: int, index: int, op: str, argument: str) -> None:
    """Refuse a capsule of another device than its exporter reported.

    Exporters differ in how they classify host memory and managed GPU memory; such differences pass.
    """
    actual = device_from_code(type_code, index)
    types = {device.type, actual.type} if actual is not None else {"unknown"}
    is_managed = types == {"cuda", "cuda_managed"} and device.index == index
    if not is_managed and not types <= {"cpu", "cuda_host"}:
        got = f"a capsule of device {type_code}:{index}"
        raise ArgumentError(op, argument, got=got, expected=f"{device}, as its exporter reported")


def _export(value: Any, no_sync: dict[str, int]) -> object:
    """Return a DLPack capsule, of the newest version that the exporter supports."""
    try:
        return value.__dlpack__(max_version=(1, 0), **no_sync)
    except Exception as error:
        let_through(error)
        # An exporter older than DLPack 1.0, or one that cannot leave the ordering to its consumer
        # (jax takes -1 for a stream). The default makes the exporter order the work itself.
        return value.__dlpack__()


def _cuda_device_of(ptr: int | None) -> Device:
    """Return the device that an address belongs to; the CUDA array interface does not name it."""
    if not ptr:
        return parse_device("cuda:0")
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    driver.cuInit(0)
    error, ordinal = driver.cuPointerGetAttribute(attribute, ptr)
    if int(error) in STICKY:
        raise lost("cuPointerGetAttribute", int(error))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"the CUDA driver does not know address {ptr:#x} ({error.name})")
    return parse_device(f"cuda:{ordinal}")
