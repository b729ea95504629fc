"""Export of tensors to other libraries: array interfaces of numpy and CUDA, and DLPack.

An export copies nothing and keeps the tensor's owner alive. A protocol that cannot express the
tensor's dtype or device raises `AttributeError`, so that a consumer tries the next protocol.

A DLPack capsule is an object of Python's C API and must be created with the GIL held. numpy creates
the capsule, over a byte of fi_ffi's memory; fi_ffi then overwrites the structure inside. This is
safe because nobody else sees the capsule before it is consumed, and numpy's deleter only releases
the array that the capsule belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import open_capsule, write_dl_tensor
from fi_ffi.abi.streams import current_scope
from fi_ffi.abi.tensor import DType, TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops.call.cuda import order

if TYPE_CHECKING:
    import numpy

_HOST = ("cpu", "cuda_host", "cuda_managed")
_GPU = ("cuda", "cuda_managed")
_NOWHERE = 4096  # the address of an empty array; numpy before 2.3 does not take 0
# DLPack type codes -> letters of the array interfaces: int, uint, float, bool.
_LETTERS = {0: "i", 1: "u", 2: "f", 6: "b"}
_LEGACY = 1  # cudaStreamLegacy; the protocols read 0 as "no stream"
_NO_ORDER = -1


class ExportError(ArgumentError, BufferError):
    """DLPack cannot export a tensor in the requested way."""


class Exported:
    """Base class of tensors that other libraries can read; `TensorDesc` gets its methods."""

    __slots__ = ()

    def _to_export(self) -> tuple[TensorDesc, object, int | None]:
        """Return the tensor, its memory's owner, and the stream that a consumer must wait for."""
        raise NotImplementedError

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy's array interface, for memory that the host can read."""
        return _interface(self._to_export()[0], _HOST, _NOWHERE)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA array interface, version 3; `stream` is the stream that writes the elements."""
        desc, _, stream = self._to_export()
        interface = _interface(desc, _GPU, 0)
        return interface | {"stream": None if stream is None else stream or _LEGACY}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> numpy.ndarray[Any, Any]:
        """Return a numpy view of the memory; dtypes of ml_dtypes are supported.

        Raises `ArgumentTypeError` for a tensor on a GPU and for elements that share bytes.
        """
        import numpy

        desc, owner, _ = self._to_export()
        if desc.device.type not in _HOST:
            _refuse(self, desc, "memory of the host: copy it, or take it as cupy or torch do")
        if desc.dtype.lanes > 1 or desc.dtype.shares_bytes:
            _refuse(self, desc, "a dtype of numpy's or ml_dtypes' with elements of whole bytes")
        plain = _typestr(desc.dtype) or f"<u{desc.dtype.itemsize}"
        array = numpy.asarray(_Holder(_described(desc, plain, _NOWHERE), owner))
        found = array.view(desc.dtype.numpy)
        if dtype is not None and numpy.dtype(dtype) != found.dtype:
            if copy is False:
                raise ValueError(f"{desc.layout} as {dtype} takes a copy")
            return found.astype(dtype)
        return found.copy() if copy else found

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self._to_export()[0].device
        return device.type_code, device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Return a DLPack capsule, which keeps the memory alive until the consumer releases it.

        On a GPU, the consumer's `stream` (None: the legacy default stream) waits for the stream
        that wrote the tensor, or for the stream of the open scope, if one is known; -1 skips the
        wait. Raises `BufferError` if a copy or another device is requested, or if the memory is
        read-only and the consumer's DLPack version has no flag for it.
        """
        desc, owner, source = self._to_export()
        here, what = self.__dlpack_device__(), f"{type(self).__name__}.__dlpack__"
        if copy:
            raise ExportError(what, "copy", got=copy, expected="None or False: nothing is copied")
        if dl_device is not None and tuple(dl_device) != here:
            raise ExportError(what, "dl_device", got=dl_device, expected=f"{here} or None")
        is_int = isinstance(stream, int) and not isinstance(stream, bool)
        if stream is not None and (not is_int or stream < _NO_ORDER):
            expected = "a stream's handle, None, or -1"
            raise ArgumentTypeError(what, "stream", got=printed(stream), expected=expected)
        if desc.device.is_cuda and stream != _NO_ORDER and source is not None:
            target, before = stream or _LEGACY, source or _LEGACY
            if target != before:
                order(desc.device, before, target)
        return _capsule(desc, owner, max_version)


def _interface(desc: TensorDesc, devices: tuple[str, ...], empty: int) -> dict[str, Any]:
    typestr = _typestr(desc.dtype)
    if desc.device.type not in devices or typestr is None:
        raise AttributeError(f"no array interface of this kind has {desc.layout}")
    return _described(desc, typestr, empty)


def _described(desc: TensorDesc, typestr: str, empty: int) -> dict[str, Any]:
    item = desc.kind.itemsize
    strides = None if desc.is_contiguous else tuple(step * item for step in desc.strides)
    return {
        "version": 3,
        "shape": desc.shape,
        "typestr": typestr,
        "data": (desc.ptr if desc.numel else empty, desc.readonly),
        "strides": strides,
    }


def _typestr(dtype: DType) -> str | None:
    letter = _LETTERS.get(dtype.code)
    if letter is None or dtype.lanes > 1 or dtype.shares_bytes:
        return None
    return f"{'|' if dtype.itemsize == 1 else '<'}{letter}{dtype.itemsize}"


def _refuse(value: object, desc: TensorDesc, expected: str) -> None:
    op = f"{type(value).__name__}.__array__"
    raise ArgumentTypeError(op, "self", got=desc.layout, expected=expected)


class _Holder:
    """An array interface for numpy to read, and the objects that own the memory."""

    __slots__ = ("__array_interface__", "kept")

    def __init__(self, interface: dict[str, Any], *kept: object) -> None:
        self.__array_interface__ = interface
        self.kept = kept


def _capsule(desc: TensorDesc, owner: object, max_version: tuple[int, int] | None) -> object:
    import numpy

    dims = ffi.new("int64_t[]", max(2 * desc.kind.rank, 1))
    address = int(ffi.cast("uintptr_t", dims))
    byte = {"version": 3, "shape": (1,), "typestr": "|u1", "data": (address, desc.readonly)}
    array: Any = numpy.asarray(_Holder(byte, dims, owner))
    try:
        capsule: object = array.__dlpack__(max_version=max_version)
    except TypeError:  # numpy < 2.1
        capsule = array.__dlpack__()
    write_dl_tensor(open_capsule(capsule)[0], desc, dims)
    return capsule


def _of_descriptor(desc: TensorDesc) -> tuple[TensorDesc, object, int | None]:
    """Export a descriptor: its owner's memory, or the memory that the caller answers for."""
    owner: Any = desc.owner
    if isinstance(owner, (TensorDesc, Exported)):
        # the owner's own owner may be released before the export
        return desc, *owner._to_export()[1:]  # type: ignore[union-attr]
    scope = current_scope() if desc.device.is_cuda else None
    is_here = scope is not None and scope.device in (None, desc.device)
    return desc, desc, scope.handle if scope is not None and is_here else None


# The protocols that the class declares.
for _name in TensorDesc.__annotations__:
    setattr(TensorDesc, _name, vars(Exported)[_name])
TensorDesc._to_export = _of_descriptor  # type: ignore[attr-defined]
