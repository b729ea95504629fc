"""Reference-counted TVM-FFI objects; each reference is released exactly once.

`ffi.gc` ties one `TVMFFIObjectDecRef` to each handle. It runs once: in `release()`, when the Python
object dies, or at exit.

Objects made by libtvm_ffi own their memory. A Tensor object over a caller's tensor and a Function
object that calls Python use memory of fi_ffi, which must outlive every reference. Such objects have
no destructor, because it could call Python after the interpreter ended. Instead, objects that a
callee still refers to are kept in `_lent` and checked again later.
"""

from __future__ import annotations

import threading
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

    __slots__ = ("_backing", "_handle")
    type_index: ClassVar[int] = TypeIndex.OBJECT_BEGIN

    def __init__(self, handle: Any, backing: tuple[Any, object] | None = None) -> None:
        """Take over a reference that the caller owns (a `TVMFFIObjectHandle`).

        `backing` must outlive every reference to the object: a block of libc's memory (or NULL) and
        a Python object.
        """
        self._handle: Any = ffi.gc(handle, library.lib.TVMFFIObjectDecRef)
        self._backing = backing

    @property
    def handle(self) -> Any:
        """The borrowed handle; raises `FiFfiError` after `release`."""
        if self._handle is None:
            raise FiFfiError(f"this {type(self).__name__} was released")
        return self._handle

    @property
    def use_count(self) -> int:
        """Number of strong references to the object, including this one."""
        return library.references(self.handle)

    def release(self) -> None:
        """Release the reference now; later calls do nothing."""
        # No call between the read and the write: if two threads release, only one gets the handle.
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if self._backing is None:
            ffi.release(handle)
        elif library.references(handle) > 1:
            _lend(handle, self._backing)
        else:
            ffi.release(handle)
            library.c_library.free(self._backing[0])
        self._backing = None

    def moved_to(self, kind: type[_Kind]) -> _Kind:
        """Move the reference to a new object of another class; this object counts as released."""
        made = object.__new__(kind)
        made._handle, made._backing = self.handle, self._backing
        self._handle = self._backing = None
        return made

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        # Without a backing, ffi.gc releases the handle; others may hold the handle too.
        backing = getattr(self, "_backing", None)
        # At interpreter exit, `_lent` is None and objects that callees hold stay as they are.
        if backing is None or _lent is None:
            return
        # an interrupt ended the release, and a callee may still refer to the backing
        if self._handle is None:
            _orphans.append(backing)
        Object.release(self)


class Function(Object):
    """A callable object; `fi_ffi.abi.function` creates and calls it."""

    __slots__ = ()
    type_index = TypeIndex.FUNCTION

    @property
    def safe_call(self) -> Any:
        return ffi.cast("FiFfiFunctionObject *", self.handle).cell.safe_call


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
            managed.manager_ctx = managed.deleter = ffi.NULL
            write_dl_tensor(managed.dl_tensor, desc, ffi.cast("int64_t *", managed + 1))
            check(library.lib.TVMFFITensorFromDLPack(managed, 0, 0, slot), "Tensor")
        except BaseException:
            library.c_library.free(block)
            raise
        return cls(slot[0], (block, desc))

    def described(self, owner: object = None) -> TensorDesc:
        """Describe the tensor, keeping `owner`; valid while a reference is held."""
        return desc_from_dl_tensor(ffi.cast("FiFfiTensorObject *", self.handle).cell, owner)


OBJECT_TYPES: dict[int, type[Object]] = {
    kind.type_index: kind for kind in (Function, Array, Module, String, Error, Tensor)
}


def bytes_of(value: Object) -> bytes:
    """Return the bytes of a heap string or of a Bytes object."""
    return library.read_bytes(ffi.cast("FiFfiBytesObject *", value.handle).cell)


# Objects that a callee still refers to, by address: fi_ffi's own reference, and the backing.
_lent: dict[int, tuple[Any, tuple[Any, object]]] = {}
# Backings of objects whose release was interrupted. A callee may refer to them, so they are kept.
_orphans: list[object] = []
_FEW = 64
_limit = _FEW
# Acquired without blocking only: a finalizer may run on the thread that is sweeping.
_sweeping = threading.Lock()
library.renew_after_fork(globals(), "_sweeping", threading.Lock)


def _lend(handle: Any, backing: tuple[Any, object]) -> None:
    _lent[library.address_of(handle)] = handle, backing
    if len(_lent) >= _limit:
        _sweep()


def _sweep() -> None:
    """Release the lent objects that no callee refers to any more."""
    global _limit
    if not _sweeping.acquire(blocking=False):
        return
    try:
        for address, (handle, backing) in _lent.copy().items():
            # The one reference left is fi_ffi's own, so nobody else can create another.
            if library.references(handle) == 1:
                del _lent[address]
                ffi.release(handle)
                library.c_library.free(backing[0])
        _limit = max(_FEW, 2 * len(_lent))
    finally:
        _sweeping.release()


def lent_count() -> int:
    """Return the number of objects over fi_ffi's memory that callees still refer to."""
    _sweep()
    return len(_lent)


class CallArena(Unique):
    """Owner of the temporary objects behind one call's arguments.

    `descs` lists all tensors among the arguments, with their argument's name. `adopt` converts the
    objects passed to Python callbacks to the caller's classes.
    """

    __slots__ = ("_owned", "adopt", "descs", "is_result", "keep", "op")

    def __init__(self, op: str, adopt: Callable[[Any], Any] | None = None) -> None:
        self.op, self.adopt = op, adopt
        self.is_result = False  # set for a callback's result, whose referents must outlive the call
        self.keep: list[object] = []
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
