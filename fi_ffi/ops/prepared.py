"""Prepared calls: packed once, launched many times, and updated in between."""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fi_ffi.abi import streams
from fi_ffi.abi.failure import take_kernel_error
from fi_ffi.abi.frame import Frame
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import Layout, TensorDesc, make_desc
from fi_ffi.errors import ArgumentError, printed
from fi_ffi.ops import watching
from fi_ffi.ops.handles import own_handle
from fi_ffi.ops.launch import launch
from fi_ffi.ops.quick import KEEP, compile_update
from fi_ffi.ops.relations import check_relations, has_relations
from fi_ffi.ops.row import Absent, Row, Scalar, Tensor
from fi_ffi.ops.settled import Settled, launch_fully, on
from fi_ffi.ops.values import check_address, check_together, number

_reclaiming = threading.Lock()
_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class Prepared:
    """A call that is packed: `call()` launches it, `call.update(...)` changes what it is of.

    Made by an op's `prepare` and by `fi_ffi.prepare`.  It launches on the stream it was
    prepared for or, prepared without one, on that of the scope that is open then.  Tensors
    that it was given are kept alive; memory given by address must stay valid.

    It has one set of packed arguments: threads may use it in turns, and not at once
    (`ArgumentError`).
    """

    __slots__ = (
        "_frame", "_is_plain", "_layouts", "_settled", "give", "mask", "masks", "no_owners",
        "owners", "place", "row", "stream", "take", "values",
    )  # fmt: skip

    def __init__(
        self, row: Row, settled: Settled, values: list[Any], descs: Sequence[TensorDesc | None],
        stream: object,
    ) -> None:  # fmt: skip
        assert settled.place is not None
        self.row, self.values, self._settled, self.stream = row, values, settled, stream
        self.place, self.masks = settled.place, settled.masks
        self._layouts = [None if desc is None else desc.layout for desc in descs]
        # What keeps each tensor's memory alive.
        self.owners: tuple[object, ...] = tuple(descs)
        self.no_owners = (None,) * len(descs)
        self.mask = functools.reduce(operator.or_, self.masks)
        if stream is not None:
            on(stream, settled.device, row.name)  # which raises for what is no stream
        # The others are put together anew each time.
        objects = [
            arg for arg, desc in zip(row.tensors, descs, strict=True) if arg.as_object and desc
        ]
        self._is_plain = not (settled.is_empty or row.allocates or objects)
        self._frame = settled.frame()
        self._frame.write(values)
        free = [self._frame]
        # Whoever has taken the frame has the call to itself.
        self.take: Callable[[], Frame] = free.pop
        self.give: Callable[[Frame], None] = free.append

    def __call__(self) -> None:
        """Launch it.  Raises `ArgumentError` without a stream, and `KernelError`."""
        try:
            frame = self.take()
        except IndexError:
            frame = self.reclaim()
        try:
            place = self.place
            if watching.inboxes or not self._is_plain:
                self._launch_fully(frame)
            elif self.stream is None and place.here is None and place.is_cuda:
                # What `launch` does, without another call.
                scopes = streams.thread.scopes
                if scopes and scopes[-1].device is place.device:
                    if frame.invoke():
                        raise take_kernel_error(place.entry)
                else:
                    launch(frame, place, None)
            else:
                launch(frame, place, self.stream)
        finally:
            self.give(frame)

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        """Change arguments: by name, or by place in the op's order.

        Tensors are given as addresses (the layout stays), or as tensors of the same
        layout.  Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        raise NotImplementedError  # each row has its own

    def __repr__(self) -> str:
        given = zip(self.row.args, self.values, strict=True)
        text = ", ".join(
            f"{arg.name}={value:#x}" if isinstance(arg, Tensor) else f"{arg.name}={value}"
            for arg, value in given
            if not isinstance(arg, Absent)
        )
        return f"<prepared {self.row.name}({text}) on {self.place.device}>"

    def in_use(self) -> ArgumentError:
        """The error for a call that another has hold of."""
        expected = "one call of it at a time: prepare one for each thread"
        got = "a prepared call that is in use, by another thread or by this one"
        return ArgumentError(self.row.name, "self", got=got, expected=expected)

    def reclaim(self) -> Frame:
        """The frame, where whoever took it is gone; raises where another has hold of it.

        A signal's exception (Ctrl-C) can come between taking it and the block that gives it back.
        """
        with _reclaiming:
            # That of the attribute, and that of the argument: nobody has it.  Without a GIL
            # these counts are not exact.
            if _HAS_GIL and sys.getrefcount(self._frame) == 2:
                self.give(self._frame)
        try:
            return self.take()
        except IndexError:
            raise self.in_use() from None

    def _launch_fully(self, frame: Frame) -> None:
        if not self._settled.is_empty:
            on_stream = on(self.stream, self.place.device, self.row.name)
            launch_fully(self.row, self._settled, frame, self.values, on_stream)

    def disown(self, tensor: int) -> None:
        """Let go of what kept a tensor's memory alive: its address was changed."""
        self.owners = (*self.owners[:tensor], None, *self.owners[tensor + 1 :])

    def change(self, frame: Frame, changes: dict[str, Any]) -> None:
        """The full way of an update: everything is checked before anything is written."""
        row, values, owners = self.row, self.values.copy(), [*self.owners]
        descs = self._descs()
        for i, arg in enumerate(row.args):
            value = changes.get(arg.name, KEEP)
            if value is KEEP:
                continue
            if isinstance(arg, Tensor):
                at = row.tensors.index(arg)
                given = self._tensor(arg, self._layouts[at], value)
                descs[at], owners[at], values[i] = given, given, given.ptr if given else 0
            elif isinstance(arg, Scalar):
                values[i] = number(row.name, arg, value)
                if arg.library:
                    values[i] = values[i] or own_handle(arg.library, self.place.device)
            else:
                expected = "what it was prepared with; prepare another call"
                raise ArgumentError(row.name, arg.name, got=printed(value), expected=expected)
        checks = zip(row.tensors, descs, self._settled.checked.alignments, strict=True)
        for arg, desc, alignment in checks:
            if desc is not None:
                check_address(row.name, arg, desc, alignment)
        if row.together:
            check_together(row, descs, values)
        if has_relations(row):
            check_relations(row, self._settled, descs, values)
        frame.write(values)
        self.values, self.owners = values, tuple(owners)

    def layout(self, name: str) -> Layout:
        """The layout of a tensor that is there."""
        at = [arg.name for arg in self.row.tensors].index(name)
        layout = self._layouts[at]
        assert layout is not None
        return layout

    def _descs(self) -> list[TensorDesc | None]:
        """The tensors as they are."""
        tensors = [i for i, arg in enumerate(self.row.args) if isinstance(arg, Tensor)]
        return [
            None if layout is None else make_desc(self.values[i], layout)
            for i, layout in zip(tensors, self._layouts, strict=True)
        ]

    def _tensor(self, arg: Tensor, layout: Layout | None, value: Any) -> TensorDesc | None:
        """A new tensor in the place of one like it."""
        op = self.row.name
        if layout is None:
            if value is None:
                return None
            expected = "None, as it was prepared; prepare another call"
            raise ArgumentError(op, arg.name, got="a tensor", expected=expected)
        if type(value) is int:
            if not 0 <= value < 2**64 - layout.span_bytes:
                expected = f"an address with room for {layout}"
                raise ArgumentError(op, arg.name, got=hex(value), expected=expected)
            return make_desc(value, layout)
        desc = as_desc(value, op, arg.name)
        # All but the last of the key, which is whether it may be written.
        if desc.layout is not layout and desc.layout.key[:-1] != layout.key[:-1]:
            expected = f"{layout}, as it was prepared; prepare another call"
            raise ArgumentError(op, arg.name, got=desc.layout, expected=expected)
        if arg.writes and desc.layout.readonly:
            raise ArgumentError(op, arg.name, got="read-only memory", expected="writable")
        return desc


@functools.cache
def _class_of(row: Row) -> type[Prepared]:
    """The class of a row's prepared calls, with the update that is compiled for it."""
    return type(
        f"Prepared_{row.name}", (Prepared,), {"__slots__": (), "update": compile_update(row)}
    )


def prepared(
    row: Row, settled: Settled, values: list[Any], descs: Sequence[TensorDesc | None],
    stream: object,
) -> Prepared:  # fmt: skip
    """A prepared call, of checked values."""
    return _class_of(row)(row, settled, values, descs, stream)
