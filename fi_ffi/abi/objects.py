"""Reference-counted TVM-FFI objects, each reference released exactly once.

`ffi.gc` ties one `TVMFFIObjectDecRef` to each handle: it runs when `release()`
is called, when the Python object dies, or at exit, whichever comes first, and
never twice.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fi_ffi.abi import library, types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check, error_from
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import FiFfiError, KernelError


class Object:
    """One owned reference; a context manager, or release it by hand."""

    __slots__ = ("_handle",)
    type_index: ClassVar[int] = types.OBJECT_BEGIN

    def __init__(self, handle: Any) -> None:
        """Take over a reference the caller owns (a `TVMFFIObjectHandle`)."""
        self._handle: Any = ffi.gc(handle, library.lib.TVMFFIObjectDecRef)

    @property
    def handle(self) -> Any:
        """The handle, borrowed; raises once released."""
        if self._handle is None:
            raise FiFfiError(f"this {type(self).__name__} was released")
        return self._handle

    @property
    def use_count(self) -> int:
        """Strong references to the object, this one included."""
        return int(ffi.cast("TVMFFIObject *", self.handle).combined_ref_count & 0xFFFFFFFF)

    def release(self) -> None:
        """Give the reference back now; later calls do nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            ffi.release(handle)

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Function(Object):
    """A callable object; `fi_ffi.abi.function` makes and calls them."""

    __slots__ = ()
    type_index = types.FUNCTION

    @property
    def safe_call(self) -> Any:
        return ffi.cast("FiFfiFunctionObject *", self.handle).cell.safe_call


class Array(Object):
    """A sequence of values, read through the functions that libtvm_ffi has for it."""

    __slots__ = ()
    type_index = types.ARRAY


class Module(Object):
    """A module object whose functions are looked up by name."""

    __slots__ = ()
    type_index = types.MODULE


class String(Object):
    """A heap string; `str()` copies it out."""

    __slots__ = ()
    type_index = types.STR

    @classmethod
    def create(cls, text: str) -> String | None:
        """An owned string, or None where the library keeps it inline (7 bytes or fewer)."""
        array, buffer = library.byte_array(text.encode())
        value = ffi.new("TVMFFIAny *")
        check(library.lib.TVMFFIStringFromByteArray(array, value), "String")
        del buffer
        return cls(value.v_ptr) if value.type_index == cls.type_index else None

    def __str__(self) -> str:
        cell = ffi.cast("FiFfiBytesObject *", self.handle).cell
        return library.read_bytes(cell).decode("utf-8", errors="replace")


class Error(Object):
    """An error that is a value, not raised."""

    __slots__ = ()
    type_index = types.ERROR

    def exception(self, op: str = "Error") -> KernelError:
        return error_from(self.handle, op)


# Memory of tensors that a callee kept a reference to: it cannot be freed safely,
# because no destructor of ours may run inside libtvm_ffi's (at exit there is no
# interpreter left to run it).
_KEPT_BY_CALLEES: list[object] = []


class Tensor(Object):
    """A Tensor object over memory somebody else owns, for entries that want no view."""

    __slots__ = ("_memory",)
    type_index = types.TENSOR
    _memory: object

    @classmethod
    def from_desc(cls, desc: TensorDesc) -> Tensor:
        managed = ffi.new("DLManagedTensor *")
        write_dl_tensor(managed.dl_tensor, desc)
        slot = ffi.new("TVMFFIObjectHandle *")
        check(library.lib.TVMFFITensorFromDLPack(managed, 0, 0, slot), "Tensor")
        tensor = cls(slot[0])
        tensor._memory = (managed, desc)
        return tensor

    def release(self) -> None:
        memory, self._memory = getattr(self, "_memory", None), None
        if memory is not None and self.use_count > 1:
            _KEPT_BY_CALLEES.append(memory)
        super().release()

    __del__ = release


def write_dl_tensor(tensor: Any, desc: TensorDesc) -> None:
    """Fill a zeroed `DLTensor`; shape and strides stay in the layout, which outlives it."""
    layout = desc.layout
    tensor.data = ffi.cast("void *", desc.ptr)
    tensor.device.device_type = layout.device.type_code
    tensor.device.device_id = layout.device.index
    tensor.ndim = len(layout.shape)
    tensor.dtype.code = layout.dtype.code
    tensor.dtype.bits = layout.dtype.bits
    tensor.dtype.lanes = layout.dtype.lanes
    tensor.shape, tensor.strides = layout.c_shape, layout.c_strides


OBJECT_TYPES: dict[int, type[Object]] = {
    kind.type_index: kind for kind in (Function, Array, Module, String, Error, Tensor)
}
