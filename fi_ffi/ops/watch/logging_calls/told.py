"""A call as it is told: its arguments by name, whatever described them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Packed
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.ops.row import (
    KV_LAYOUTS,
    Absent,
    Arg,
    IntArray,
    KvLayout,
    Row,
    Tensor,
    TensorArray,
    Text,
)

if TYPE_CHECKING:
    from fi_ffi.ops.call.compiled import Variant


class Opaque(NamedTuple):
    """A value that has no more than words."""

    words: str

    def __repr__(self) -> str:
        return self.words


class Argument(NamedTuple):
    """A tensor, or (without one) a value."""

    name: str
    tensor: TensorDesc | None
    value: Any
    reads: bool = True
    writes: bool = False
    # What is in it before and after means nothing.
    is_scratch: bool = False

    def __str__(self) -> str:
        if self.tensor is None:
            return repr(self.value)
        return f"{self.tensor.layout} at {self.tensor.ptr:#x}"


# Axes of memory that the caller brings and an entry works in: of plans, and of single requests.
_ROOM = ("float_bytes", "int_bytes", "tmp_bytes", "tmp_size")


def is_scratch(arg: Tensor) -> bool:
    """Whether a tensor is memory for partial results, or the room that a plan makes its own."""
    is_room = arg.writes and arg.dtype == "uint8" and arg.axes in _ROOM
    return arg.is_scratch or is_room


def arguments_of(variant: Variant, packed: Packed) -> list[Argument]:
    """The arguments of a call as its entry is given them."""
    slots = enumerate(variant.compiled.row.slots)
    found = (_argument(variant, packed, i, arg) for i, arg in slots)
    return [argument for argument in found if argument is not None]


def _argument(variant: Variant, packed: Packed, i: int, arg: Arg) -> Argument | None:
    if isinstance(arg, TensorArray):  # its tensors come after all arguments
        return None
    if isinstance(arg, Absent):
        return Argument(arg.name, None, None)
    if isinstance(arg, Tensor):
        kind = variant.kind_of(arg)
        if kind is None:
            return Argument(arg.name, None, None)
        tensor = packed.tensor(i, kind)
        return Argument(arg.name, tensor, tensor.ptr, arg.reads, arg.writes, is_scratch(arg))
    at = packed.layout.value(i)
    if isinstance(arg, IntArray):
        address = packed.addresses[at]
        told = Opaque(f"an array object at {address:#x}") if address else None
        return Argument(arg.name, None, told)
    if isinstance(arg, Text):
        return Argument(arg.name, None, text_at(packed.addresses[at]))
    value: Any = packed.words[at]
    if isinstance(arg, KvLayout):
        value = next(name for name, code in KV_LAYOUTS.items() if code == value)
    elif arg.type is float:
        value = packed.floats[at]
    return Argument(arg.name, None, bool(value) if getattr(arg, "type", None) is bool else value)


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
            found.append(Argument(name, desc, desc.ptr, reads=True, writes=True))
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
        return [arg for arg in self.arguments if arg.tensor is not None]
