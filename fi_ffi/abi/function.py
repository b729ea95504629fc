"""Entries (functions with TVM-FFI's calling convention) and the frames of their calls.

A frame holds the packed arguments of one call in one buffer: an array of `TVMFFIAny`, a `DLTensor`
for each tensor, and the tensors' shapes and strides. The parts that depend on dtypes and devices
are written when the frame is made. A call overwrites addresses, sizes, strides and numbers through
memoryviews of the buffer, which is several times faster than assigning through cffi.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import write_kind
from fi_ffi.abi.failure import check_kernel, take_raised
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import (
    Array,
    CallArena,
    Function,
    Module,
    Object,
    Tensor,
    Unique,
    find_global,
    set_global,
)
from fi_ffi.abi.signature import Signature, signature_from_mismatch
from fi_ffi.abi.tensor import TensorKind, frozen
from fi_ffi.abi.values import make_function, pack_arguments, unpack
from fi_ffi.errors import AbiError, KernelError, LoaderError


class Entry(Unique):
    """A function pointer with TVM-FFI's calling convention, and its first argument.

    An exported symbol takes a null handle. A function object takes its own handle, and `owner`
    keeps the object alive.
    """

    __slots__ = ("address", "handle", "name", "owner")

    def __init__(self, name: str, address: Any, handle: Any = ffi.NULL, owner: object = None):
        self.name = name
        self.address = ffi.cast("TVMFFISafeCallType", address)
        self.handle = handle
        self.owner = owner

    @classmethod
    def of(cls, function: Function, name: str) -> Entry:
        return cls(name, function.safe_call, function.handle, function)

    def __call__(self, *args: object) -> Any:
        """Call with Python values; return a Python value or an owned object."""
        arena = CallArena(self.name)
        try:
            return self.invoke(pack_arguments(args, arena), len(args))
        finally:
            arena.end()

    def invoke(self, packed: Any, count: int) -> Any:
        """Call with packed arguments; return a Python value or an owned object."""
        # The slot is local to the call: an entry that fails may leave a value in it that nobody
        # owns.
        result = ffi.new("TVMFFIAny *")
        check_kernel(self.address(self.handle, packed, count, result), self.name)
        return unpack(result, owned=True)


# More arguments than any function takes. A probe with no arguments would run a function that has no
# parameters.
PROBE_ARGUMENTS = 512
_PROBE = ffi.new("TVMFFIAny[]", PROBE_ARGUMENTS)


def probe(entry: Entry) -> Signature:
    """Return the entry's own signature, which it prints when it refuses a wrong argument count.

    A typed function (all of FlashInfer's are typed) counts its arguments first, so a probe does no
    CUDA work and touches no memory. A packed function accepts any number of arguments and has no
    signature: the probe runs it and raises `AbiError`.
    """
    result = ffi.new("TVMFFIAny *")
    if entry.address(entry.handle, _PROBE, PROBE_ARGUMENTS, result):
        refusal = take_raised(entry.name)
        if isinstance(refusal, KernelError):
            return signature_from_mismatch(refusal.message)
        raise refusal
    unpack(result, owned=True)
    raise AbiError(f"{entry.name} takes any arguments: it has no signature of its own")


def global_function(name: str) -> Entry:
    """Return a function of libtvm_ffi's global table, such as `ffi.ArraySize`."""
    return Entry.of(find_global(name), name)


# Cached: libtvm_ffi's own functions exist as long as it is loaded.
library_function = functools.cache(global_function)


def make_array(values: Sequence[object]) -> Array:
    """Return an owned Array of `values`."""
    array: Array = library_function("ffi.Array")(*values)
    return array


def array_values(array: Array) -> list[Any]:
    """Return the elements of an Array, as Python values or owned objects."""
    size, item = library_function("ffi.ArraySize"), library_function("ffi.ArrayGetItem")
    arena, found = CallArena(item.name), []
    try:
        packed = pack_arguments((array, 0), arena)
        for i in range(size.invoke(packed, 1)):
            packed[1].v_int64 = i
            found.append(item.invoke(packed, 2))
        return found
    finally:
        arena.end()


def module_function(module: Module, name: str) -> Entry:
    """Return the function `name` of a Module object; `LoaderError` if the module has none."""
    function = library_function("ffi.ModuleGetFunction")(module, name, False)
    if not isinstance(function, Function):
        raise LoaderError(f"the module object has no function {name!r}")
    return Entry.of(function, name)


def register(name: str, signature: Signature, function: Callable[..., Any]) -> Entry:
    """Register a Python function as a TVM-FFI function, in the global table under `name`.

    The function refuses a wrong argument count with the message of a compiled one, so `probe` reads
    its signature. Its exceptions become TVM-FFI errors.
    """
    made = make_function(name, function, signature)
    set_global(name, made)
    return Entry.of(made, name)


_ANY_WORDS = ffi.sizeof("TVMFFIAny") // 8
_TENSOR_WORDS = ffi.sizeof("DLTensor") // 8
NO_STREAM = -1  # value of a frame's `before` word if no stream has to be restored
# A string is passed as the address of its bytes.
_SCALARS = {
    int: TypeIndex.INT,
    bool: TypeIndex.BOOL,
    float: TypeIndex.FLOAT,
    str: TypeIndex.RAW_STR,
}


@functools.cache
def _c_text(text: str) -> Any:
    return ffi.new("char[]", text.encode())


def c_text(text: str) -> int:
    """Return the address of a C string that is never freed; for the few constant arguments."""
    return int(ffi.cast("uintptr_t", _c_text(text)))


class FrameLayout:
    """Offsets of an entry's arguments in a frame, in words of 8 bytes.

    `ranks` has an item for each argument: the rank of a tensor, None for any other value. Shapes
    and strides of the arguments in `last` are placed after those that each call writes. Items past
    `count` are not arguments but tensors inside an argument's Array.
    """

    def __init__(
        self, ranks: Sequence[int | None], last: Collection[int] = (), count: int | None = None
    ) -> None:
        self.ranks, self.count = tuple(ranks), len(ranks) if count is None else count
        self.result = _ANY_WORDS * self.count
        self.before = self.result + _ANY_WORDS
        self.device = self.before + 1
        at = self.device + 1
        self.tensors: dict[int, int] = {}
        for i, rank in enumerate(ranks):
            if rank is not None:
                self.tensors[i] = at
                at += _TENSOR_WORDS
        # Shapes and strides are contiguous, so that one `struct` call writes all of them.
        self.dims: dict[int, int] = {}
        self.first_dims = self.last_dims = at
        for i in sorted(self.tensors, key=lambda i: (i in last, i)):
            self.dims[i] = at
            at += 2 * (ranks[i] or 0)
            if i not in last:
                self.last_dims = at
        self.words = at

    def value(self, i: int) -> int:
        """Return the word that holds an argument's value; for a tensor, its address."""
        return self.tensors[i] if i in self.tensors else _ANY_WORDS * i + 1


# Content of a frame's slot: a tensor's kind (with True: passed as an object), a scalar's type,
# ARRAY for an Array object given by address, a range for an Array of the Tensor objects in these
# slots, or None for an omitted optional argument.
ARRAY = "array"
Scalars = type[int] | type[bool] | type[float] | type[str]
Slot = tuple[TensorKind, bool] | Scalars | str | range | None


def _references_of(made: Object) -> memoryview:
    """Return a live view of an object's strong reference count."""
    header = ffi.cast("TVMFFIObject *", made.handle)
    count = ffi.addressof(header, "combined_ref_count")
    return memoryview(ffi.buffer(count, 4)).cast("B").cast("I")


class Frame:
    """Packed arguments of one call at a time; two calls must not share a frame concurrently.

    `words`, `addresses` and `floats` view its memory as int64, uint64 and float64.
    """

    def __init__(self, layout: FrameLayout, slots: Sequence[Slot], entry: Entry) -> None:
        memory = self._buffer = ffi.new("int64_t[]", layout.words)
        view = memoryview(ffi.buffer(memory)).cast("B")
        self.words, self.addresses, self.floats = view.cast("q"), view.cast("Q"), view.cast("d")
        self.layout, self.entry = layout, entry
        # The shapes and strides that calls write, and what was last written there.
        self.dims = view[8 * layout.first_dims : 8 * layout.last_dims]
        self.written: bytes | None = None
        # The stream that was current before a call, restored after it.
        self.before = ffi.cast("TVMFFIStreamHandle *", memory + layout.before)
        self.before_word = layout.before
        self.words[layout.before] = NO_STREAM
        # Owned by `launch`: the stream of the last call that was given one, and what sets it.
        self.pointer: Any = None
        self.set_stream: Any = None
        # The device that is current when a call begins, as CUDA writes it.
        self.device, self.device_word = ffi.cast("int *", memory + layout.device), layout.device
        self._result = ffi.cast("TVMFFIAny *", memory + layout.result)
        # Tensor objects owned by this frame, by argument.
        self._objects: dict[int, Tensor] = {}
        self.has_objects = False
        # Each Tensor object's address field, and the word of this frame to copy into it.
        self._cells: list[tuple[memoryview, int]] = []
        self._arrays: list[Array] = []
        # Each object's reference count, and how many of the references are this frame's own.
        self._references: list[tuple[memoryview, int]] = []
        # Owned by the callers: the variant and the launch target that the frame was made for, what
        # puts it back into its pool after a call, and the plan's placement and schedule that it was
        # last written for.
        self.variant: Any = None
        self.target: Any = None
        self.give_back: Any = None
        self.version: object = None
        self.state: object = None
        for i, slot in enumerate(slots):
            self._fill(i, slot)
        for i, slot in enumerate(slots):
            if isinstance(slot, range):
                self._fill_array(i, slot)
        # Runs the entry and returns its error code.
        self.invoke: Callable[[], int] = functools.partial(
            entry.address, entry.handle, ffi.cast("TVMFFIAny *", memory), layout.count, self._result
        )

    def _fill(self, i: int, slot: Slot) -> None:
        """Write the parts of a slot that no call changes."""
        index = self.words
        if slot is None:
            index[_ANY_WORDS * i] = TypeIndex.NONE
        elif slot == ARRAY or isinstance(slot, range):
            index[_ANY_WORDS * i] = TypeIndex.ARRAY
        elif isinstance(slot, tuple):
            kind, as_object = slot
            tensor = ffi.cast("DLTensor *", self._buffer + self.layout.tensors[i])
            write_kind(tensor, kind, self._buffer + self.layout.dims[i])
            made = self._make_object(i, kind).handle if as_object else tensor
            self.has_objects = self.has_objects or as_object
            if i < self.layout.count:
                index[_ANY_WORDS * i] = TypeIndex.TENSOR if as_object else TypeIndex.DL_TENSOR_PTR
                self.addresses[_ANY_WORDS * i + 1] = int(ffi.cast("uintptr_t", made))
        else:
            index[_ANY_WORDS * i] = _SCALARS[slot]  # type: ignore[index]

    def _make_object(self, i: int, kind: TensorKind) -> Tensor:
        """Create a Tensor object that uses this frame's shape and strides."""
        nothing = frozen(0, (0,) * kind.rank, (1,) * kind.rank, kind, None)
        made, at = Tensor.from_desc(nothing), self.layout.tensors[i]
        cell = ffi.addressof(ffi.cast("FiFfiTensorObject *", made.handle).cell)
        ffi.memmove(cell, self._buffer + at, ffi.sizeof("DLTensor"))
        self._objects[i] = made
        # Beside this frame's, there is one in `objects._lent`, and for a tensor past the arguments
        # one in an Array.
        self._references.append((_references_of(made), 2 + (i >= self.layout.count)))
        # The address is the first field of the object's copy of the DLTensor.
        self._cells.append((memoryview(ffi.buffer(cell, 8)).cast("B").cast("Q"), at))
        return made

    def _fill_array(self, i: int, items: range) -> None:
        made = make_array([self._objects[item] for item in items])
        self._arrays.append(made)
        self._references.append((_references_of(made), 1))
        self.addresses[_ANY_WORDS * i + 1] = int(ffi.cast("uintptr_t", made.handle))

    def place_objects(self) -> None:
        """Copy the written addresses into the Tensor objects, before a call."""
        for cell, at in self._cells:
            cell[0] = self.addresses[at]

    @property
    def is_referred_to(self) -> bool:
        """Whether a callee kept one of the Tensor objects; the frame must not be reused then."""
        for references, own in self._references:  # noqa: SIM110  # a generator is slower
            if references[0] != own:
                return True
        return False

    def call(self) -> Any:
        """Call the entry with the written arguments; return the result, which the caller owns."""
        code = self.invoke()
        if code:
            self.drop_result()
            check_kernel(code, self.entry.name)
        return self.take_result()

    def take_result(self) -> Any:
        """Return the last call's result and transfer its ownership to the caller."""
        words, at = self.words, self.layout.result
        if words[at] & 0xFFFFFFFF == TypeIndex.NONE:
            return None
        try:
            return unpack(self._result, owned=True)
        finally:
            words[at] = words[at + 1] = 0  # otherwise the next call could return it again

    def peek_result(self) -> Any:
        """Return a new reference to the last call's result; the frame keeps its own."""
        return unpack(self._result, owned=False)

    def drop_result(self) -> None:
        """Clear the result slot; a failed call has no result."""
        at = self.layout.result
        self.words[at] = self.words[at + 1] = 0
