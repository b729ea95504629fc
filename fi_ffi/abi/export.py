"""Tensors as other libraries read them: numpy's and numba's array interfaces, and DLPack.

What is exported keeps the tensor's owner alive.  Nothing is copied.  A tensor's memory is on one
kind of device, and what its dtype or device has no form for is not there (`AttributeError`), so
that a consumer goes on to the next protocol.

A DLPack capsule is an object of Python's C API, which must be made with the GIL.  numpy makes
one, of a byte of ours, and the structure inside is then written anew: until it is consumed it is
ours alone, and numpy's own deleter, which knows no more of it than whose it is, gives all back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

if TYPE_CHECKING:
    import numpy

    from fi_ffi.abi.tensor import Device, DType, TensorDesc

_HOST = ("cpu", "cuda_host", "cuda_managed")
_GPU = ("cuda", "cuda_managed")
# DLPack's kinds of numbers that the interfaces have a letter for: int, uint, float, bool.
_LETTERS = {0: "i", 1: "u", 2: "f", 6: "b"}
_LEGACY = 1  # cudaStreamLegacy; 0 means no stream to the protocols
_NO_ORDER = -1

# Lets work of the third argument's stream wait for the second's; there with the CUDA runtime.
order: Callable[[Device, int, int], None] | None = None


class ExportError(ArgumentError, BufferError):
    """A tensor that DLPack cannot give as it is asked for."""


class Exported:
    """What has a tensor: the protocols of other libraries."""

    __slots__ = ()

    def _to_export(self) -> tuple[TensorDesc, object, int | None]:
        """The tensor, what keeps its memory, and the stream whose work is to be waited for."""
        raise NotImplementedError

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy's protocol for memory that the host reads."""
        return _interface(self._to_export()[0], _HOST)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3: `stream` is the one that makes the elements."""
        desc, _, stream = self._to_export()
        told = _interface(desc, _GPU)
        return told | {"stream": None if stream is None else stream or _LEGACY}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> numpy.ndarray[Any, Any]:
        """numpy's view of the memory, of ml_dtypes' types too.

        Raises `ArgumentTypeError` for a tensor on a GPU, and for elements that share bytes.
        """
        import numpy

        desc, owner, _ = self._to_export()
        if desc.device.type not in _HOST:
            _refuse(self, desc, "memory of the host: copy it, or take it as cupy or torch do")
        if desc.dtype.lanes > 1 or desc.dtype.shares_bytes:
            _refuse(self, desc, "a dtype of numpy's or ml_dtypes' with elements of whole bytes")
        plain = _typestr(desc.dtype) or f"<u{desc.dtype.itemsize}"
        told = numpy.asarray(_Holder(_described(desc, plain), owner))
        found = told.view(desc.dtype.numpy)
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
        """A DLPack capsule, which keeps the memory until its consumer lets go of it.

        On a GPU the consumer's `stream` (None: the legacy default one) is made to wait for the
        work of the stream that the tensor was made on, or of the open scope, where one is known;
        -1 orders nothing.  Raises `BufferError` for a copy, another device, and where the memory
        is read-only and the consumer's version of DLPack cannot say so.
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
        if desc.device.is_cuda and stream != _NO_ORDER and source is not None and order is not None:
            target, before = stream or _LEGACY, source or _LEGACY
            if target != before:
                order(desc.device, before, target)
        return _capsule(desc, owner, max_version)


def _interface(desc: TensorDesc, devices: tuple[str, ...]) -> dict[str, Any]:
    typestr = _typestr(desc.dtype)
    if desc.device.type not in devices or typestr is None:
        raise AttributeError(f"no array interface of this kind has {desc.layout}")
    return _described(desc, typestr)


def _described(desc: TensorDesc, typestr: str) -> dict[str, Any]:
    item = desc.kind.itemsize
    strides = None if desc.is_contiguous else tuple(step * item for step in desc.strides)
    return {
        "version": 3,
        "shape": desc.shape,
        "typestr": typestr,
        "data": (desc.ptr if desc.numel else 0, desc.readonly),
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
    """Memory that numpy makes an array of, and what keeps it."""

    __slots__ = ("__array_interface__", "kept")

    def __init__(self, interface: dict[str, Any], *kept: object) -> None:
        self.__array_interface__ = interface
        self.kept = kept


def _capsule(desc: TensorDesc, owner: object, max_version: tuple[int, int] | None) -> object:
    import numpy

    from fi_ffi.abi.interop import open_capsule
    from fi_ffi.abi.objects import write_dl_tensor

    dims = ffi.new("int64_t[]", max(2 * desc.kind.rank, 1))
    address = int(ffi.cast("uintptr_t", dims))
    byte = {"version": 3, "shape": (1,), "typestr": "|u1", "data": (address, desc.readonly)}
    array: Any = numpy.asarray(_Holder(byte, dims, owner))
    try:
        capsule: object = array.__dlpack__(max_version=max_version)
    except TypeError:  # numpy from before 2.1
        capsule = array.__dlpack__()
    write_dl_tensor(open_capsule(capsule)[0], desc, dims)
    return capsule
