"""Frames: the packed arguments of a kernel call, written once and then updated.

A frame is made for a fixed list of slots (a tensor of this layout here, a float
there).  Everything that depends on the layouts is written when it is made; a
call writes one word per pointer and scalar, through memoryviews over the C
arrays, which is several times quicker than assigning through cffi.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fi_ffi.abi import types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check_kernel
from fi_ffi.abi.function import Entry
from fi_ffi.abi.objects import Tensor, write_dl_tensor
from fi_ffi.abi.tensor import Layout, make_desc
from fi_ffi.abi.values import unpack

_DL_WORDS = ffi.sizeof("DLTensor") // 8  # `data` is a DLTensor's first word
# Text goes by the address of its bytes.
_SCALARS = {int: types.INT, bool: types.BOOL, float: types.FLOAT, str: types.RAW_STR}


def word_of(slot: int, is_tensor: bool) -> int:
    """Where a slot's value is: in `Frame.pointers` a tensor's, in `ints` or `floats` a number's."""
    return slot * _DL_WORDS if is_tensor else 2 * slot + 1


@functools.cache
def _c_text(text: str) -> Any:
    return ffi.new("char[]", text.encode())


def c_text(text: str) -> int:
    """The address of a text as C has it, which stays: for the few words of arguments."""
    return int(ffi.cast("uintptr_t", _c_text(text)))


def _unbound() -> int:
    raise RuntimeError("a frame that was bound to no entry")


class TensorSlot:
    """A tensor argument: a `DLTensor *`, or (`as_object`) a Tensor object."""

    __slots__ = ("as_object", "layout")

    def __init__(self, layout: Layout, as_object: bool) -> None:
        self.layout, self.as_object = layout, as_object


class ArraySlot:
    """An Array object, given by the address of its handle."""

    __slots__ = ()


# None: an optional argument that is not there; its value is 0.
Slot = TensorSlot | ArraySlot | type[int] | type[bool] | type[float] | type[str] | None


class Frame:
    """Packed arguments for one call at a time; not to be shared while in use."""

    __slots__ = (
        "_args", "_count", "_keep", "_objects", "_result", "_writers",
        "before", "floats", "ints", "invoke", "pointers",
    )  # fmt: skip

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._count = len(slots)
        self._args = ffi.new("TVMFFIAny[]", self._count)
        self._result = ffi.new("TVMFFIAny *")
        tensors = ffi.new("DLTensor[]", max(self._count, 1))
        self._keep: list[object] = [tensors, [s for s in slots if isinstance(s, TensorSlot)]]
        # The words that a call writes: see `word_of`.
        self.pointers = memoryview(ffi.buffer(tensors)).cast("B").cast("Q")
        self.ints = memoryview(ffi.buffer(self._args)).cast("B").cast("q")
        self.floats = memoryview(ffi.buffer(self._args)).cast("B").cast("d")
        # The stream that a call found current, to be put back.
        self.before = ffi.new("TVMFFIStreamHandle *")
        # The call itself, of the entry that the frame was bound to: its error code.
        self.invoke: Callable[[], int] = _unbound
        self._objects: list[tuple[int, Layout]] = []
        # One (view, word) per slot: where its value goes on each call.
        self._writers: list[tuple[Any, int]] = []
        for i, slot in enumerate(slots):
            if isinstance(slot, TensorSlot):
                self._writers.append(self._add_tensor(i, slot, tensors))
            elif slot is None or isinstance(slot, ArraySlot):
                self._args[i].type_index = types.NONE if slot is None else types.ARRAY
                self._writers.append((self.ints, word_of(i, False)))
            else:
                self._args[i].type_index = _SCALARS[slot]
                words = self.floats if slot is float else self.ints
                self._writers.append((words, word_of(i, False)))

    def _add_tensor(self, i: int, slot: TensorSlot, tensors: Any) -> tuple[Any, int]:
        write_dl_tensor(tensors[i], make_desc(0, slot.layout))
        if slot.as_object:
            self._args[i].type_index = types.TENSOR
            self._objects.append((i, slot.layout))
        else:
            self._args[i].type_index = types.DL_TENSOR_PTR
            self._args[i].v_ptr = tensors + i
        return self.pointers, word_of(i, True)

    def bind(self, entry: Entry) -> Frame:
        """Let `invoke` call an entry."""
        pointer = ffi.cast("TVMFFIAny *", self._args)
        self.invoke = functools.partial(
            entry.address, entry.handle, pointer, self._count, self._result
        )
        return self

    def write(self, values: Sequence[Any]) -> None:
        """Write addresses (of tensors and objects) and numbers, of every slot."""
        for (view, word), value in zip(self._writers, values, strict=True):
            view[word] = value

    def call(self, entry: Entry, values: Sequence[Any]) -> Any:
        """Write `values` (addresses for tensors and objects) and call; the entry's result.

        The values are trusted: types and ranges were checked before.
        """
        self.write(values)
        if self._objects:
            return self._call_with_objects(entry, values)
        return self._call(entry)

    def _call(self, entry: Entry) -> Any:
        result = self._result
        code = entry.address(entry.handle, self._args, self._count, result)
        if code:
            result.type_index = types.NONE  # whatever it has written there is no result
            check_kernel(code, entry.name)
        return self.take_result()

    def take_result(self) -> Any:
        """What the last call returned; the caller owns it now."""
        result = self._result
        if result.type_index == types.NONE:
            return None
        try:
            return unpack(result, owned=True)
        finally:
            # Also of what could not be read: the next call must not take it for its own.
            result.type_index, result.v_int64 = types.NONE, 0

    def _call_with_objects(self, entry: Entry, values: Sequence[Any]) -> Any:
        held: list[Tensor] = []
        try:
            for i, layout in self._objects:
                tensor = Tensor.from_desc(make_desc(values[i], layout))
                held.append(tensor)
                self._args[i].v_ptr = tensor.handle
            return self._call(entry)
        finally:
            for tensor in held:
                tensor.release()
