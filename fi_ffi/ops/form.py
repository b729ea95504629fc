"""From a row to a call: describe, validate, pack, set the stream and device, call.

This is the one way a typed call takes, on every device.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from fi_ffi.abi.frame import ArraySlot, Frame, Slot, TensorSlot
from fi_ffi.abi.function import Entry
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import Layout, TensorDesc, make_layout
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.check import Checked, Given, check_layouts
from fi_ffi.ops.providers import entry_for
from fi_ffi.ops.row import KV_LAYOUTS, Arg, KvLayout, Row, Scalar, Tensor

_CACHE_LIMIT = 1024
_INT64 = 2**63
_NO_STREAM = contextlib.nullcontext()


class _Settled:
    """What a combination of layouts needs, worked out once: checked, and frames to fill."""

    __slots__ = ("checked", "device", "entry", "frames", "is_empty", "slots")

    def __init__(self, form: Form, layouts: Given, kv_layout: str) -> None:
        row = form.row
        self.checked: Checked = check_layouts(row, layouts, kv_layout, form.known)
        self.device = next(
            layout.device
            for arg, layout in zip(row.tensors, layouts, strict=True)
            if layout is not None and not arg.host
        )
        if row.nothing_axis:
            self.is_empty = not self.checked.sizes[row.nothing_axis]
        else:
            written = [lay for arg, lay in zip(row.tensors, layouts, strict=True) if arg.writes]
            self.is_empty = bool(written) and not any(
                lay is not None and lay.numel for lay in written
            )
        strided = any(isinstance(arg, KvLayout) and arg.strided for arg in row.args)
        as_nhd = kv_layout == "HND" and strided
        of_tensor = iter(layouts)
        self.slots = [_slot(arg, of_tensor, as_nhd) for arg in row.args]
        self.entry: Entry | None = None
        # Free frames: list.pop and append are atomic, so concurrent calls get their own.
        self.frames: list[Frame] = []


def _slot(arg: Arg, of_tensor: Any, as_nhd: bool) -> Slot:
    if isinstance(arg, Tensor):
        layout = next(of_tensor)
        if layout is None:
            return None
        return TensorSlot(_nhd(layout) if as_nhd and arg.kv else layout, arg.as_object)
    if isinstance(arg, Scalar):
        return arg.type
    return int if isinstance(arg, KvLayout) else ArraySlot()


def _nhd(layout: Layout) -> Layout:
    """The same memory with the axes of heads and tokens exchanged."""

    def exchanged(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:-3], numbers[-2], numbers[-3], numbers[-1])

    shape, strides = exchanged(layout.shape), exchanged(layout.strides)
    return make_layout(shape, layout.dtype, strides, layout.device, layout.readonly)


class Form:
    """One row's way of being called.

    A plan gives the `module` its row's family stands for, and the sizes `known` to it.
    """

    def __init__(
        self, row: Row, module: str | None = None, known: Mapping[str, int] | None = None
    ) -> None:
        self.row = row
        self.module = module or row.module
        self.known = known
        indexed = list(enumerate(row.args))
        self._tensors = [(i, arg) for i, arg in indexed if isinstance(arg, Tensor)]
        self._scalars = [(i, arg) for i, arg in indexed if isinstance(arg, Scalar)]
        layouts = [(i, arg) for i, arg in indexed if isinstance(arg, KvLayout)]
        self._kv_layout = layouts[0] if layouts else None
        self._settled: dict[tuple[object, ...], _Settled] = {}

    @functools.cached_property
    def bind(self) -> Callable[..., tuple[list[Any], object]]:
        """The arguments of a call as a list in the ABI's order, and the stream."""
        return _binder(self.row)

    def is_on_cuda(self, values: list[Any]) -> bool:
        """Whether the first tensor is on a GPU; it is left described in `values`."""
        i, arg = self._tensors[0]
        desc = values[i] = as_desc(values[i], self.row.name, arg.name)
        return desc.device.is_cuda

    def __call__(self, values: list[Any], stream: object) -> Any:
        """Check everything, and launch unless there is nothing to write."""
        descs: list[TensorDesc | None] = []
        for i, arg in self._tensors:
            value = values[i]
            if value is None and arg.optional:
                descs.append(None)
                values[i] = 0
                continue
            if type(value) is not TensorDesc:
                value = as_desc(value, self.row.name, arg.name)
            descs.append(value)
            values[i] = value.ptr
        for i, scalar in self._scalars:
            values[i] = _scalar(self.row.name, scalar, values[i])
        settled = self._settle([None if desc is None else desc.layout for desc in descs], values)
        if settled.is_empty:
            return None
        alignments = settled.checked.alignments
        for (_, arg), desc, alignment in zip(self._tensors, descs, alignments, strict=True):
            if desc is not None and (desc.ptr % alignment or not desc.ptr) and desc.layout.numel:
                raise _bad_address(self.row.name, arg, desc, alignment)
        return self._launch(settled, values, stream)

    def _settle(self, layouts: list[Layout | None], values: list[Any]) -> _Settled:
        kv_layout = "NHD"
        if self._kv_layout is not None:
            i, arg = self._kv_layout
            kv_layout = values[i]
            if type(kv_layout) is not str or kv_layout not in KV_LAYOUTS:
                expected = " or ".join(map(repr, KV_LAYOUTS))
                raise ArgumentError(self.row.name, arg.name, got=repr(kv_layout), expected=expected)
            values[i] = 0 if arg.strided else KV_LAYOUTS[kv_layout]
        key = (kv_layout, *layouts)
        settled = self._settled.get(key)
        if settled is None:
            settled = _Settled(self, layouts, kv_layout)
            if len(self._settled) >= _CACHE_LIMIT:
                self._settled.clear()
            self._settled[key] = settled
        return settled

    def _launch(self, settled: _Settled, values: list[Any], stream: object) -> Any:
        device = settled.device
        on_stream = launching(stream, device, self.row.name) if device.is_cuda else _NO_STREAM
        if settled.entry is None:
            settled.entry = entry_for(self.row, device, self.module)
        try:
            frame = settled.frames.pop()
        except IndexError:
            frame = Frame(settled.slots)
        # Some launchers, and all of the CUDA runtime, use the device that is current.
        before = machine.make_current(device.index) if device.is_cuda else None
        try:
            with on_stream:
                if not self.row.allocates:
                    return frame.call(settled.entry, values)
                with cuda.kernel_memory().installed():
                    return frame.call(settled.entry, values)
        finally:
            settled.frames.append(frame)
            if before is not None:
                machine.make_current(before)

    def forget(self) -> None:
        """Drop what was learnt from earlier calls, after the source of kernels changed."""
        self._settled.clear()


def _scalar(op: str, arg: Scalar, value: Any) -> Any:
    """`value` as the scalar's own type; a bool is no number, and an int is a float."""
    if type(value) is not arg.type:
        wanted = {int: numbers.Integral, float: numbers.Real, bool: bool}[arg.type]
        if not isinstance(value, wanted) or (isinstance(value, bool) and arg.type is not bool):
            got = f"{type(value).__name__} {value!r:.60}"
            raise ArgumentTypeError(op, arg.name, got=got, expected=arg.abi_type)
        try:
            value = arg.type(value)  # type: ignore[call-overload,arg-type]
        except OverflowError:
            raise ArgumentError(op, arg.name, got=value, expected="a finite number") from None
    if arg.type is int and not -_INT64 <= value < _INT64:
        raise ArgumentError(op, arg.name, got=value, expected="an int64")
    if arg.type is float and not abs(value) < float("inf"):
        raise ArgumentError(op, arg.name, got=value, expected="a finite number")
    if arg.low is not None and value < arg.low:
        raise ArgumentError(op, arg.name, got=value, expected=f"{arg.low} or more")
    return value


def _bad_address(op: str, arg: Tensor, desc: TensorDesc, alignment: int) -> ArgumentError:
    expected = f"an address that is a multiple of {alignment} bytes, and not null"
    return ArgumentError(op, arg.name, got=f"{desc.ptr:#x} for {desc.layout}", expected=expected)


def parameters(row: Row) -> str:
    """The op's Python parameters: the ABI's order, then the stream by keyword."""

    def one(arg: Arg) -> str:
        if isinstance(arg, Tensor) and arg.optional:
            return f"{arg.name}=None"
        default = getattr(arg, "default", None)
        return arg.name if default is None else f"{arg.name}={default!r}"

    parts = [one(arg) for arg in row.args]
    return ", ".join([*parts, "*", "stream=None"])


def _binder(row: Row) -> Callable[..., tuple[list[Any], object]]:
    """A function with the op's own parameters that returns them as a list.

    Compiled, as dataclasses' `__init__` is: the interpreter then binds names and
    defaults, and its own TypeError names the op for a missing or unknown one.
    """
    names = ", ".join(arg.name for arg in row.args)
    source = f"def {row.name}({parameters(row)}):\n    return [{names}], stream\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    binder: Callable[..., tuple[list[Any], object]] = namespace[row.name]
    return binder
