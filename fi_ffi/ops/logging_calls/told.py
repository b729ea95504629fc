"""A call as it is told: its arguments by name, whatever described them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.abi.frame import ArraySlot, Slot, TensorSlot
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.ops.row import KV_LAYOUTS, Absent, Arg, KvLayout, Row, Tensor


class Opaque(NamedTuple):
    """A value that has no more than words."""

    words: str

    def __repr__(self) -> str:
        return self.words


class Argument(NamedTuple):
    """A tensor, by its layout and address, or (without a layout) a value."""

    name: str
    layout: Layout | None
    value: Any
    reads: bool = True
    writes: bool = False
    # What is in it before and after means nothing.
    is_scratch: bool = False

    def __str__(self) -> str:
        if self.layout is None:
            return repr(self.value)
        return f"{self.layout} at {self.value:#x}"


# Axes of memory that the caller brings and an entry works in: of plans, and of single requests.
_ROOM = ("float_bytes", "int_bytes", "tmp_bytes", "tmp_size")


def is_scratch(arg: Tensor) -> bool:
    """Whether a tensor is memory for partial results, or the room that a plan makes its own."""
    is_room = arg.writes and arg.dtype == "uint8" and arg.axes in _ROOM
    return arg.is_scratch or is_room


def arguments_of(row: Row, slots: Sequence[Slot], values: Sequence[Any]) -> list[Argument]:
    """The arguments of a call as its entry is given them."""
    return [
        _argument(arg, slot, value)
        for arg, slot, value in zip(row.args, slots, values, strict=True)
    ]


def _argument(arg: Arg, slot: Slot, value: Any) -> Argument:
    if slot is None or isinstance(arg, Absent):
        return Argument(arg.name, None, None)
    if isinstance(slot, TensorSlot) and isinstance(arg, Tensor):
        if arg.empty and slot.layout.shape == (0,) and not value:  # stands for none
            return Argument(arg.name, None, None)
        scratch = is_scratch(arg)
        return Argument(arg.name, slot.layout, value, arg.reads, arg.writes, scratch)
    if isinstance(slot, ArraySlot):
        return Argument(arg.name, None, Opaque(f"an array object at {value:#x}"))
    if slot is str:
        return Argument(arg.name, None, text_at(value))
    if isinstance(arg, KvLayout):
        value = next(name for name, code in KV_LAYOUTS.items() if code == value)
    return Argument(arg.name, None, value)


def text_at(address: int) -> str:
    """A text argument, by its address."""
    text: str = ffi.string(ffi.cast("char *", address)).decode(errors="replace")
    return text


def arguments_of_values(
    values: Sequence[Any], tensors: Sequence[tuple[str, TensorDesc]]
) -> list[Argument]:
    """The arguments of a function that no row describes, by their numbers.

    What it writes is not known, so all tensors may be.
    """
    of_value: dict[str, list[TensorDesc]] = {}
    for where, desc in tensors:
        of_value.setdefault(where.partition(":")[0], []).append(desc)
    found: list[Argument] = []
    for i, value in enumerate(values):
        descs = of_value.get(str(i))
        if descs is None:
            is_plain = value is None or isinstance(value, (bool, int, float, str))
            told = value if is_plain else Opaque(f"{type(value).__name__} {value!r:.200}")
            found.append(Argument(str(i), None, told))
            continue
        for n, desc in enumerate(descs):  # several, in an array of them
            name = f"{i}.{n}" if n else str(i)
            found.append(Argument(name, desc.layout, desc.ptr, reads=True, writes=True))
    return found


class Told(NamedTuple):
    """One call of an entry."""

    number: int
    # As its caller knows it.
    name: str
    entry: str
    device: Device | None
    # None where there is none: on the CPU.
    stream: int | None
    arguments: list[Argument]
    # Of a call that a row describes.
    row: Row | None = None
    module: str = ""
    plan: Any = None
    # Where it was called, in words.
    caller: str = ""
    # The plan, in words.
    plan_words: str = ""

    @property
    def tensors(self) -> list[Argument]:
        return [arg for arg in self.arguments if arg.layout is not None]
