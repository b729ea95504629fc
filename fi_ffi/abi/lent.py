"""What is made for one call, and what of it a callee keeps.

Tensor objects and Python functions given to a callee are ours: their memory must outlive
every reference.  A destructor that called back into Python could run when there is no
interpreter left, so none is given: what a callee still refers to after a call is kept here,
and looked at again later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check
from fi_ffi.abi.function import make_function
from fi_ffi.abi.objects import Object, Tensor, write_dl_tensor
from fi_ffi.abi.tensor import Layout, TensorDesc, make_desc

_FEW = 64
_CACHE_LIMIT = 4096
_ALIGNMENT = 64
_BLOCK = -(-ffi.sizeof("DLManagedTensor") // _ALIGNMENT) * _ALIGNMENT
_Free = Callable[[], object]


# A `DLTensor` for each layout that was seen, with no address.
_templates: dict[Layout, Any] = {}


def template(layout: Layout) -> Any:
    """What a `DLTensor` of a layout has besides its address, to be copied."""
    found = _templates.get(layout)
    if found is None:
        found = ffi.new("DLTensor *")
        write_dl_tensor(found, make_desc(0, layout))
        if len(_templates) >= _CACHE_LIMIT:
            _templates.clear()
        _templates[layout] = found
    return found[0]


class Call:
    """What the arguments of one call need until it is over.

    `descs` are all tensors among them, each with the name of its argument.
    """

    __slots__ = ("_made", "descs", "keep", "op")

    def __init__(self, op: str) -> None:
        self.op = op
        self.keep: list[object] = []
        self.descs: list[tuple[str, TensorDesc]] = []
        # A container comes after what is in it.
        self._made: list[tuple[Object, _Free | None]] = []

    def own(self, made: Object) -> Object:
        """Release an object that the library made when the call is over."""
        self._made.append((made, None))
        return made

    def tensor(self, desc: TensorDesc) -> Object:
        """A Tensor object over a tensor of the caller's."""
        # libc's memory: what a callee still has at exit is read after the interpreter is gone.
        block = library.c_library().aligned_alloc(_ALIGNMENT, _BLOCK)
        if block == ffi.NULL:
            raise MemoryError("a Tensor object's header")
        managed = ffi.cast("DLManagedTensor *", block)
        managed.manager_ctx, managed.deleter = ffi.NULL, ffi.NULL
        managed.dl_tensor = template(desc.layout)
        managed.dl_tensor.data = ffi.cast("void *", desc.ptr)
        slot = ffi.new("TVMFFIObjectHandle *")
        check(library.lib.TVMFFITensorFromDLPack(managed, 0, 0, slot), "Tensor")
        return self._lend(Tensor(slot[0]), _Block(block, desc).free)

    def function(self, function: Callable[..., Any]) -> Object:
        """A Function object that calls a Python function."""
        name = getattr(function, "__name__", type(function).__name__)
        made, callback = make_function(str(name), function)
        return self._lend(made, _Block(None, callback).free)

    def _lend(self, made: Object, free: _Free) -> Object:
        self._made.append((made, free))
        return made

    def end(self) -> None:
        """Release what was made for the call; of what is kept elsewhere, keep the memory."""
        while self._made:
            made, free = self._made.pop()
            if free is None:
                made.release()
            elif made.use_count > 1:
                _lent.add(made, free)
            else:
                made.release()
                free()


class _Block:
    """Memory of an object that was lent, and what else must live as long."""

    __slots__ = ("_address", "_keep")

    def __init__(self, address: Any, keep: object) -> None:
        self._address, self._keep = address, keep

    def free(self) -> None:
        address, self._address, self._keep = self._address, None, None
        if address is not None:
            library.c_library().free(address)


class _Lent:
    """Objects that a callee kept a reference to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[tuple[Object, _Free]] = []
        self._limit = _FEW

    def __len__(self) -> int:
        return len(self._held)

    def add(self, made: Object, free: _Free) -> None:
        with self._lock:
            self._held.append((made, free))
            is_full = len(self._held) >= self._limit
        if is_full:
            self.sweep()

    def sweep(self) -> None:
        """Release what nobody else refers to any more."""
        still: list[tuple[Object, _Free]] = []
        done: list[tuple[Object, _Free]] = []
        with self._lock:
            for pair in self._held:
                # With one reference, which is ours, nobody can make another.
                (done if pair[0].use_count == 1 else still).append(pair)
            self._held, self._limit = still, max(_FEW, 2 * len(still))
        for made, free in done:
            made.release()
            free()


_lent = _Lent()


def lent_count() -> int:
    """How many objects that were made for calls are referred to by callees now."""
    _lent.sweep()
    return len(_lent)
