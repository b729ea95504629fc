"""Reference-counted TVM-FFI objects; each reference is released exactly once.

`ffi.gc` ties one `TVMFFIObjectDecRef` to each handle. It runs when nobody holds the handle any
more: calls and descriptors that read an object hold its handle, so `release` on another thread
takes nothing from them. No destructor here is written in Python, where an exception of a signal
handler would be lost.

Objects made by libtvm_ffi own their memory. A Tensor object over a caller's tensor and a Function
object that calls Python use memory of fi_ffi, which must outlive every reference. `_lent` holds
that memory and one reference, and is looked through when such an object is released, and when there
are many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import desc_from_dl_tensor, write_dl_tensor
from fi_ffi.abi.failure import check, error_from
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import FiFfiError, KernelError, LoaderError

_Kind = TypeVar("_Kind", bound="Object")

_ALIGNMENT = 64
_HEADER = ffi.sizeof("DLManagedTensor")
_WORD = ffi.sizeof("int64_t")


class Unique:
    """Base class of objects that hold a reference and cannot be copied or pickled."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} holds a reference in this process: no copy, and no pickle")


class Object(Unique):
    """One owned reference to a TVM-FFI object; close it as a context manager or with `release`."""

    __slots__ = ("_handle", "_number", "depth")
    type_index: ClassVar[int] = TypeIndex.OBJECT_BEGIN

    def __init__(self, handle: Any, backing: object = None) -> None:
        """Take over a reference that the caller owns (a `TVMFFIObjectHandle`).

        `backing` is a Python object that must outlive every other reference to the object.
        """
        self._handle: Any = ffi.gc(handle, library.lib.TVMFFIObjectDecRef)
        self._number = None if backing is None else _lend(handle, backing)
        # Bounds how deep the containers inside are nested, as far as fi_ffi's calls nested them.
        self.depth = 0

    @property
    def handle(self) -> Any:
        """The handle; hold it while you read the object. Raises `FiFfiError` after `release`."""
        handle = self._handle
        if handle is None:
            raise FiFfiError(f"this {type(self).__name__} was released")
        return handle

    @property
    def use_count(self) -> int:
        """Number of strong references to the object, including this one, and fi_ffi's own if it is
        over fi_ffi's memory."""
        return library.references(self.handle)

    def release(self) -> None:
        """Release the reference, or leave that to the calls that read it; later calls do
        nothing."""
        self._handle = None
        if self._number is not None:
            _take_back(self._number)

    def moved_to(self, kind: type[_Kind]) -> _Kind:
        """Move the reference to a new object of another class; this object counts as released."""
        made = object.__new__(kind)
        made._handle, made._number, made.depth = self.handle, self._number, self.depth
        self._handle = self._number = None
        return made

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Function(Object):
    """A callable object; `fi_ffi.abi.function` creates and calls it."""

    __slots__ = ()
    type_index = TypeIndex.FUNCTION

    @property
    def safe_call(self) -> Any:
        handle = self.handle
        return ffi.cast("FiFfiFunctionObject *", handle).cell.safe_call


class Array(Object):
    """A sequence of values, read through libtvm_ffi's own functions."""

    __slots__ = ()
    type_index = TypeIndex.ARRAY


class Module(Object):
    """A module object whose functions are looked up by name."""

    __slots__ = ()
    type_index = TypeIndex.MODULE


class String(Object):
    """A heap-allocated string; `str()` copies it."""

    __slots__ = ()
    type_index = TypeIndex.STR

    def __str__(self) -> str:
        return bytes_of(self).decode("utf-8", errors="replace")


class Error(Object):
    """An error passed as a value instead of raised."""

    __slots__ = ()
    type_index = TypeIndex.ERROR

    def exception(self, op: str = "Error") -> KernelError:
        return error_from(self.handle, op)


class Tensor(Object):
    """A Tensor object: allocated by a kernel, or over memory of another owner."""

    __slots__ = ()
    type_index = TypeIndex.TENSOR

    @classmethod
    def from_desc(cls, desc: TensorDesc) -> Tensor:
        """Return a Tensor object over a caller's tensor, for callees that do not accept a view."""
        size = _HEADER + 2 * _WORD * len(desc.shape)
        block = library.aligned(size, _ALIGNMENT)
        try:
            managed, slot = ffi.cast("DLManagedTensor *", block), ffi.new("TVMFFIObjectHandle *")
            managed.manager_ctx = ffi.NULL
            # The block begins with `managed`, so the last reference frees it, whoever has it.
            managed.deleter = ffi.cast("void(*)(DLManagedTensor *)", library.c_library.free)
            write_dl_tensor(managed.dl_tensor, desc, ffi.cast("int64_t *", managed + 1))
            check(library.lib.TVMFFITensorFromDLPack(managed, 0, 0, slot), "Tensor")
        except BaseException:
            library.c_library.free(block)
            raise
        return cls(slot[0], desc)

    def described(self) -> TensorDesc:
        """Describe the tensor, which lives as long as the descriptor."""
        return tensor_of(self.handle)


def tensor_of(handle: Any) -> TensorDesc:
    """Describe a Tensor object; the descriptor keeps its handle."""
    return desc_from_dl_tensor(ffi.cast("FiFfiTensorObject *", handle).cell, handle)


OBJECT_TYPES: dict[int, type[Object]] = {
    kind.type_index: kind for kind in (Function, Array, Module, String, Error, Tensor)
}


def bytes_of(value: Object) -> bytes:
    """Return the bytes of a heap string or of a Bytes object."""
    handle = value.handle
    return library.read_bytes(ffi.cast("FiFfiBytesObject *", handle).cell)


# Objects over fi_ffi's memory: fi_ffi's own reference, and the backing. No step of what follows
# needs a lock: any thread may repeat it, and so may a signal handler in between.
_lent: dict[int, tuple[Any, object]] = {}
_numbers = itertools.count()
_FEW = 64
_limit = _FEW


def _lend(handle: Any, backing: object) -> int:
    """Hold the backing of an object for as long as anybody refers to the object."""
    number = next(_numbers)
    library.lib.TVMFFIObjectIncRef(handle)
    _lent[number] = ffi.gc(handle, library.lib.TVMFFIObjectDecRef), backing
    if len(_lent) >= _limit:
        _sweep()
    return number


def _take_back(number: int) -> None:
    """Drop a backing if the one reference left is fi_ffi's own: nobody can create another."""
    found = _lent.get(number)
    if found is not None and library.references(found[0]) == 1:
        _lent.pop(number, None)


def _sweep() -> None:
    """Drop the backings of the objects to which nobody else refers any more."""
    global _limit
    for number in [*_lent]:
        _take_back(number)
    _limit = max(_FEW, 2 * len(_lent))


def lent_count() -> int:
    """Return the number of objects over fi_ffi's memory that anybody refers to."""
    _sweep()
    return len(_lent)


class CallArena(Unique):
    """Owner of the temporary objects behind one call's arguments.

    `descs` lists all tensors among the arguments, with their argument's name. `adopt` converts the
    objects passed to Python callbacks to the caller's classes. `depth` is that of the containers
    among the arguments, and `level` that of the one being packed.
    """

    __slots__ = ("_owned", "adopt", "depth", "descs", "is_result", "keep", "level", "op")

    def __init__(self, op: str, adopt: Callable[[Any], Any] | None = None) -> None:
        self.op, self.adopt = op, adopt
        self.is_result = False  # set for a callback's result, whose referents must outlive the call
        self.keep: list[object] = []
        self.depth = self.level = 0
        self.descs: list[tuple[str, TensorDesc]] = []
        self._owned: list[Object] = []

    def own(self, made: _Kind) -> _Kind:
        """Register an object to be released at the end of the call."""
        self._owned.append(made)
        return made

    def end(self) -> None:
        """Release the call's objects, newest first: a container goes before its elements."""
        while self._owned:
            self._owned.pop().release()


def find_global(name: str) -> Function:
    """Return a function of libtvm_ffi's global table; `LoaderError` if `name` is not in it."""
    array, _buffer = library.byte_array(name.encode())
    slot = ffi.new("TVMFFIObjectHandle *")
    with library.tables:
        check(library.lib.TVMFFIFunctionGetGlobal(array, slot), name)
    if slot[0] == ffi.NULL:
        raise LoaderError(f"libtvm_ffi has no global function {name!r}")
    return Function(slot[0])


def set_global(name: str, function: Function) -> None:
    """Set a function in libtvm_ffi's global table, replacing any of the same name."""
    array, _buffer = library.byte_array(name.encode())
    with library.tables:
        check(library.lib.TVMFFIFunctionSetGlobal(array, function.handle, 1), name)
