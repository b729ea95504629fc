"""From a row to a call: describe, validate, pack, set the stream, call.

This is the one way a typed call takes, on every device.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable
from typing import Any

from fi_ffi.abi.frame import Frame, Slot, TensorSlot
from fi_ffi.abi.function import Entry
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.check import check_layouts
from fi_ffi.ops.providers import entry_for
from fi_ffi.ops.row import Row, Scalar, Tensor

_CACHE_LIMIT = 1024
_INT64 = 2**63
_NO_STREAM = contextlib.nullcontext()


class _Plan:
    """What a combination of layouts needs, worked out once: checked, and frames to fill."""

    __slots__ = ("alignments", "device", "entry", "frames", "is_empty", "slots")

    def __init__(self, row: Row, layouts: tuple[Layout, ...]) -> None:
        self.alignments = check_layouts(row, layouts)
        self.device = layouts[0].device
        written = (lay for arg, lay in zip(row.tensors, layouts, strict=True) if arg.writes)
        self.is_empty = not any(layout.numel for layout in written)
        of_tensor = iter(layouts)
        self.slots: list[Slot] = [
            TensorSlot(next(of_tensor), arg.as_object) if isinstance(arg, Tensor) else arg.type
            for arg in row.args
        ]
        self.entry: Entry | None = None
        # Free frames: list.pop and append are atomic, so concurrent calls get their own.
        self.frames: list[Frame] = []


class Form:
    """One row's way of being called."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.bind = _binder(row)
        self._tensors = [(i, arg) for i, arg in enumerate(row.args) if isinstance(arg, Tensor)]
        self._scalars = [(i, arg) for i, arg in enumerate(row.args) if isinstance(arg, Scalar)]
        self._plans: dict[tuple[Layout, ...], _Plan] = {}

    def is_on_cuda(self, values: list[Any]) -> bool:
        """Whether the first tensor is on a GPU; it is left described in `values`."""
        i, arg = self._tensors[0]
        desc = values[i] = as_desc(values[i], self.row.name, arg.name)
        return desc.device.is_cuda

    def __call__(self, values: list[Any], stream: object) -> None:
        """Check everything, and launch unless there is nothing to write."""
        descs = []
        for i, arg in self._tensors:
            value = values[i]
            desc = value if type(value) is TensorDesc else as_desc(value, self.row.name, arg.name)
            descs.append(desc)
            values[i] = desc.ptr
        for i, scalar in self._scalars:
            values[i] = _scalar(self.row.name, scalar, values[i])
        plan = self._plan(tuple([desc.layout for desc in descs]))
        if plan.is_empty:
            return
        for (_, arg), desc, alignment in zip(self._tensors, descs, plan.alignments, strict=True):
            if desc.ptr % alignment or not desc.ptr:
                raise _bad_address(self.row.name, arg, desc, alignment)
        self._launch(plan, values, stream)

    def _plan(self, layouts: tuple[Layout, ...]) -> _Plan:
        plan = self._plans.get(layouts)
        if plan is None:
            plan = _Plan(self.row, layouts)
            if len(self._plans) >= _CACHE_LIMIT:
                self._plans.clear()
            self._plans[layouts] = plan
        return plan

    def _launch(self, plan: _Plan, values: list[Any], stream: object) -> None:
        device = plan.device
        on_stream = launching(stream, device, self.row.name) if device.is_cuda else _NO_STREAM
        if plan.entry is None:
            plan.entry = entry_for(self.row, device)
        try:
            frame = plan.frames.pop()
        except IndexError:
            frame = Frame(plan.slots)
        try:
            with on_stream:
                frame.call(plan.entry, values)
        finally:
            plan.frames.append(frame)

    def forget(self) -> None:
        """Drop what was learnt from earlier calls, after the source of kernels changed."""
        self._plans.clear()


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

    def one(arg: Tensor | Scalar) -> str:
        if isinstance(arg, Tensor) or arg.default is None:
            return arg.name
        return f"{arg.name}={arg.default!r}"

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
