"""Records of calls: the function, its arguments, the caller, and whether the call is over."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame
from fi_ffi.abi.tensor import Device, TensorDesc, TensorKind, frozen
from fi_ffi.errors import let_through
from fi_ffi.ops.call import hooks
from fi_ffi.ops.call.row import (
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
    from fi_ffi.watch.stream_progress import ProgressCell

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Axes of scratch memory that callers pass, for plans and for single requests.
_WORKSPACE_AXES = ("float_bytes", "int_bytes", "tmp_bytes", "tmp_size")


class Opaque(NamedTuple):
    """A value recorded by its description only."""

    description: str

    def __repr__(self) -> str:
        return self.description


class Argument(NamedTuple):
    """A tensor, or a value if `tensor` is None."""

    name: str
    tensor: TensorDesc | None
    value: Any
    reads: bool = True
    writes: bool = False
    # Whether it is scratch, whose contents mean nothing.
    is_scratch: bool = False

    def __str__(self) -> str:
        if self.tensor is None:
            return repr(self.value)
        return f"{self.tensor.layout} at {self.tensor.ptr:#x}"


class CallRecord:
    """One call of an entry, and its progress; only the calling thread writes it."""

    def __init__(
        self,
        name: str,
        entry: str,
        device: Device | None,
        stream: int | None,
        list_arguments: Callable[[], list[Argument]],
        row: Row | None = None,
        module: str = "",
    ) -> None:
        self.name, self.entry, self.device, self.stream = name, entry, device, stream
        self._list_arguments = list_arguments
        # Set for calls that a row describes.
        self.row, self.module = row, module
        self.plan = hooks.thread.plan
        self.plan_generation = self.plan._generation if self.plan is not None else 0
        self.thread = threading.current_thread()
        self.method, self.file, self.line, self.function = _caller(sys._getframe(1))
        # The cell to which the call's stream writes its progress, and the number that it writes
        # after the call's work; None until that write is queued.
        self.cell: ProgressCell | None = None
        self.mark: int | None = None
        # Whether the call has returned and queued nothing.
        self.is_ended = False
        self.started = time.monotonic()

    @functools.cached_property
    def arguments(self) -> list[Argument]:
        """The arguments as passed to the entry, listed on first access."""
        return self._list_arguments()

    def tensors(self, *of: str) -> dict[str, TensorDesc]:
        """Return the tensors except scratch: all of them, or those that the entry `reads` or
        `writes`."""
        return {
            arg.name: arg.tensor
            for arg in self.arguments
            if arg.tensor is not None
            and not arg.is_scratch
            and all(getattr(arg, one) for one in of)
        }

    @property
    def op(self) -> str:
        """The op as the caller knows it; for a plan's calls, the plan's class."""
        return self.name if self.plan is None else str(self.plan.op)

    @property
    def qualname(self) -> str:
        """The function as the caller knows it; for a plan's calls, with the method."""
        if self.plan is None:
            return self.name
        kind = type(self.plan).__name__
        # A prepared run is called as an object: name the plan's class alone.
        return kind if self.method == "__init__" else f"{kind}.{self.method.strip('_')}"

    @property
    def caller(self) -> str:
        """The caller's file, line, function and thread."""
        where = f"{self.file}:{self.line} in {self.function}" if self.file else "unknown code"
        return f"{where}, thread {self.thread.name!r}"

    @property
    def plan_summary(self) -> str:
        """The plan's backend, module, batch and options that are not defaults; "" for calls without
        a plan."""
        if self.plan is None:
            return ""
        try:
            return self._summarize_plan()
        except Exception as error:  # the plan is still being made, or has unexpected values
            let_through(error)
            return f"a {type(self.plan).__name__} that cannot be told: {error!r}"

    def _summarize_plan(self) -> str:
        plan = self.plan
        parts = [f"backend {plan.backend!r}", f"module {plan.module}"]
        batch = getattr(plan, "_batch", None)
        if batch is not None:
            parts.append(f"{batch.size} requests")
        parts.append(str(plan.options))
        if plan._generation != self.plan_generation:
            parts.append("planned since")
        method = "a prepared run" if self.method == "__call__" else self.method
        return f"{type(plan).__name__}, {method}: {', '.join(parts)}"

    @property
    def has_returned(self) -> bool:
        return self.is_ended or self.mark is not None

    @property
    def left(self) -> int:
        """The number of marks that the stream has yet to write before the call's; 0 if its work is
        done or unmarked."""
        if self.cell is None or self.mark is None:
            return 0
        return self.cell.until(self.mark)

    @property
    def is_over(self) -> bool:
        """Whether the call has returned and its stream has done its work."""
        return self.has_returned and not self.left


def place_of(device: Device | None, stream: int | None) -> str:
    """Describe the device and stream of a call."""
    if stream is None:
        return "the host" if device is None else str(device)
    return f"{device}, stream {stream:#x}"


def _is_ours(frame: FrameType) -> bool:
    # Functions compiled from a row have no file in the package, and no `__name__` in their globals.
    return frame.f_code.co_filename.startswith(_PACKAGE) or "__name__" not in frame.f_globals


def _caller(frame: FrameType | None) -> tuple[str, str, int, str]:
    """Return the function of fi_ffi that was called, and the caller's file, line and function."""
    method = ""
    while frame is not None and _is_ours(frame):
        method = frame.f_code.co_name
        frame = frame.f_back
    if frame is None:
        return method, "", 0, ""
    return method, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


class Packed:
    """A copy of a frame's contents: its words as int64, uint64 and float64."""

    __slots__ = ("addresses", "floats", "layout", "words")

    def __init__(self, frame: Frame) -> None:
        view = memoryview(bytes(frame.words))
        self.layout = frame.layout
        self.words, self.addresses, self.floats = view.cast("q"), view.cast("Q"), view.cast("d")

    def tensor(self, i: int, kind: TensorKind) -> TensorDesc:
        """Return the tensor in slot `i`, as last written."""
        at, rank = self.layout.dims[i], kind.rank
        sizes, steps = self.words[at : at + rank], self.words[at + rank : at + 2 * rank]
        address = self.addresses[self.layout.tensors[i]]
        return frozen(address, tuple(sizes), tuple(steps), kind, None)


def of_frame(frame: Frame, stream: int | None) -> CallRecord:
    """Return the record of a frame's call."""
    variant, packed = frame.variant, Packed(frame)
    compiled = variant.compiled
    return CallRecord(
        compiled.row.name.partition(".")[0],
        frame.entry.name,
        variant.device,
        stream,
        functools.partial(_arguments_of, variant, packed),
        compiled.row,
        compiled.module,
    )


def of_values(
    name: str,
    values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]],
    device: Device | None,
    stream: int | None,
) -> CallRecord:
    """Return the record of a call without a row."""
    # Listed now: later the values may have been freed or changed.
    arguments = _arguments_of_values(values, tensors)
    return CallRecord(name, name, device, stream, lambda: arguments)


def _arguments_of(variant: Variant, packed: Packed) -> list[Argument]:
    """Return a call's arguments as its entry gets them."""
    slots = enumerate(variant.compiled.row.slots)
    # The tensors of Arrays follow all arguments.
    return [
        _argument(variant, packed, i, arg) for i, arg in slots if not isinstance(arg, TensorArray)
    ]


def _argument(variant: Variant, packed: Packed, i: int, arg: Arg) -> Argument:
    assert not isinstance(arg, TensorArray)
    kind = variant.kind_of(arg) if isinstance(arg, Tensor) else None
    if isinstance(arg, Tensor) and kind is not None:
        tensor = packed.tensor(i, kind)
        is_workspace = arg.writes and arg.dtype == "uint8" and arg.axes in _WORKSPACE_AXES
        is_scratch = arg.is_scratch or is_workspace
        return Argument(arg.name, tensor, tensor.ptr, arg.reads, arg.writes, is_scratch)
    if isinstance(arg, (Absent, Tensor)):
        return Argument(arg.name, None, None)
    at = packed.layout.value(i)
    value: Any = packed.words[at]
    address = packed.addresses[at]
    if isinstance(arg, IntArray):
        value = Opaque(f"an array object at {address:#x}") if address else None
    elif isinstance(arg, Text):
        value = ffi.string(ffi.cast("char *", address)).decode(errors="replace")
    elif isinstance(arg, KvLayout):
        value = next(name for name, code in KV_LAYOUTS.items() if code == value)
    elif arg.type is float:
        value = packed.floats[at]
    elif arg.type is bool:
        value = bool(value)
    return Argument(arg.name, None, value)


def _arguments_of_values(
    values: Sequence[Any], tensors: Sequence[tuple[str, TensorDesc]]
) -> list[Argument]:
    """Return the arguments by number. Which tensors are written is unknown, so all count as
    written."""
    of_value: dict[str, list[TensorDesc]] = {}
    for where, desc in tensors:
        of_value.setdefault(where.partition(":")[0], []).append(desc)
    arguments: list[Argument] = []
    for i, value in enumerate(values):
        descs = of_value.get(str(i))
        if descs is None:
            is_plain = value is None or isinstance(value, (bool, int, float, str))
            recorded = value if is_plain else Opaque(f"{type(value).__name__} {value!r:.200}")
            arguments.append(Argument(str(i), None, recorded))
            continue
        for n, desc in enumerate(descs):  # an Array has several tensors
            name = f"{i}.{n}" if n else str(i)
            arguments.append(Argument(name, desc, desc.ptr, reads=True, writes=True))
    return arguments
