"""What a combination of layouts needs, worked out once: checks, frames, and the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from fi_ffi.abi.device import Device
from fi_ffi.abi.frame import ArraySlot, Frame, Slot, TensorSlot, word_of
from fi_ffi.abi.function import Entry
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import Layout, make_layout
from fi_ffi.ops import cuda, watching
from fi_ffi.ops.check import Checked, Given
from fi_ffi.ops.launch import Place
from fi_ffi.ops.nhd import nhd_layout
from fi_ffi.ops.row import KV_LAYOUTS, Absent, Arg, KvLayout, Row, Scalar, Tensor, Text


class Settled:
    """A row's call with tensors of these layouts, which fit it."""

    __slots__ = (
        "_constants", "checked", "device", "entry", "frames", "is_empty", "masks", "module",
        "place", "seen", "slots",
    )  # fmt: skip

    def __init__(self, row: Row, checked: Checked, layouts: Given, kv_layout: str) -> None:
        self.checked = checked
        self.device = next(
            layout.device
            for arg, layout in zip(row.tensors, layouts, strict=True)
            if layout is not None and not arg.host
        )
        if row.nothing_axis:
            self.is_empty = not self.checked.sizes[row.nothing_axis]
        else:
            written = [
                layout
                for arg, layout in zip(row.tensors, layouts, strict=True)
                if arg.writes and not arg.is_scratch
            ]
            self.is_empty = bool(written) and not any(
                layout is not None and layout.numel for layout in written
            )
        strided = any(isinstance(arg, KvLayout) and arg.strided for arg in row.args)
        as_nhd = kv_layout == "HND" and strided
        of_tensor = iter(layouts)
        self.slots = [_slot(arg, of_tensor, as_nhd, self.device) for arg in row.args]
        # What no quick call writes: where in a frame, and what.
        self._constants = [
            (word_of(i, False), 0 if arg.strided else KV_LAYOUTS[kv_layout])
            for i, arg in enumerate(row.args)
            if isinstance(arg, KvLayout)
        ] + [(word_of(i, False), arg.value) for i, arg in enumerate(row.args) if _is_number(arg)]
        # Bits that an address must not have; alignments are powers of 2.
        self.masks = tuple(alignment - 1 for alignment in checked.alignments)
        # What passed `check_relations`.
        self.seen: set[tuple[Any, ...]] = set()
        # Set at the first launch: where it is, and free frames bound to its entry.  list.pop and
        # append are atomic, so concurrent calls get their own.
        self.entry: Entry | None = None
        self.module = ""
        self.place: Place | None = None
        self.frames: list[Frame] = []

    def start(self, entry: Entry, op: str, module: str = "") -> None:
        """Settle what is called, and where."""
        self.module, self.place, self.entry = module, Place(self.device, op, entry.name), entry

    def frame(self) -> Frame:
        """A frame of this call's own, until it is put back."""
        try:
            return self.frames.pop()
        except IndexError:
            assert self.entry is not None
            frame = Frame(self.slots).bind(self.entry)
            for word, value in self._constants:
                frame.ints[word] = value
            return frame


def on(stream: object, device: Device, op: str) -> launching | None:
    """The stream of one call; None on the CPU, which has none."""
    return launching(stream, device, op) if device.is_cuda else None


def launch_fully(
    row: Row, settled: Settled, frame: Frame, values: Sequence[Any], on_stream: launching | None
) -> Any:
    """Write a frame and call: watched, with memory for kernels that allocate, with a result."""
    call: Callable[..., Any] = frame.call
    if on_stream is None:
        if watching.inboxes:
            call = watching.watched(call, row, settled, None)
        return _call(call, row, settled, values)
    # Some launchers, and all of the CUDA runtime, use the device that is current.
    with cuda.current(settled.device), on_stream:
        if watching.inboxes:
            call = watching.watched(call, row, settled, on_stream.handle)
        return _call(call, row, settled, values)


def _call(call: Callable[..., Any], row: Row, settled: Settled, values: Sequence[Any]) -> Any:
    if not row.allocates:
        return call(settled.entry, values)
    with cuda.kernel_memory().installed():
        return call(settled.entry, values)


def _slot(arg: Arg, of_tensor: Iterator[Layout | None], as_nhd: bool, device: Device) -> Slot:
    if isinstance(arg, Absent):
        return int if _is_number(arg) else _no_elements(device)
    if isinstance(arg, Tensor):
        layout = next(of_tensor)
        if layout is None:
            return _no_elements(device) if arg.empty else None
        return TensorSlot(nhd_layout(layout) if as_nhd and arg.kv else layout, arg.as_object)
    if isinstance(arg, Scalar):
        return arg.type
    if isinstance(arg, Text):
        return str
    return int if isinstance(arg, KvLayout) else ArraySlot()


def _is_number(arg: Arg) -> TypeGuard[Absent]:
    return isinstance(arg, Absent) and arg.abi_type == "int"


def _no_elements(device: Device) -> Slot:
    """A tensor without elements, which has no address."""
    return TensorSlot(make_layout((0,), "uint8", None, device, False), False)
