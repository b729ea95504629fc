"""From a row to a call: describe, validate, pack, set the stream and device, call.

This is the one way a typed call takes, on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.errors import ArgumentError, LoaderError, printed
from fi_ffi.ops.check import check_device, check_layouts
from fi_ffi.ops.handles import own_handle
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.memory import scratch_for
from fi_ffi.ops.prepared import prepared
from fi_ffi.ops.providers import entry_for
from fi_ffi.ops.quick import compile_again, compile_quick, parameters
from fi_ffi.ops.relations import check_relations, has_relations
from fi_ffi.ops.row import (
    KV_LAYOUTS,
    REQUIRED,
    Absent,
    KvLayout,
    Row,
    Scalar,
    Tensor,
    Text,
    default_of,
)
from fi_ffi.ops.settled import Settled, launch_fully, on
from fi_ffi.ops.values import check_address, check_together, number, word

_CACHE_LIMIT = 1024


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
        self._texts = [(i, arg) for i, arg in indexed if isinstance(arg, Text)]
        self._handles = [(i, arg) for i, arg in self._scalars if arg.library]
        self._absent = [(i, arg.value) for i, arg in indexed if isinstance(arg, Absent)]
        self._has_relations = has_relations(row)
        layouts = [(i, arg) for i, arg in indexed if isinstance(arg, KvLayout)]
        self._kv_layout = layouts[0] if layouts else None
        self._scratch = [(i, arg) for i, arg in self._tensors if arg.is_scratch]
        self._settled: dict[tuple[object, ...], Settled] = {}

    @functools.cached_property
    def _first(self) -> tuple[int, Tensor]:
        """The first tensor that every call is given, and its place."""
        return next((i, arg) for i, arg in self._tensors if default_of(arg) is None)

    @functools.cached_property
    def bind(self) -> Callable[..., tuple[list[Any], object]]:
        """The arguments of a call as a list in the ABI's order, and the stream."""
        return _binder(self.row)

    def is_on_cuda(self, values: list[Any]) -> bool:
        """Whether the first tensor is on a GPU; it is left described in `values`."""
        i, arg = self._first
        desc = values[i] = as_desc(values[i], self.row.name, arg.name)
        return desc.device.is_cuda

    @functools.cached_property
    def quick(self) -> Callable[..., Any]:
        """A method of ops, with the op's parameters: `compile_quick`."""
        return compile_quick(self.row, self._settled, self)

    @functools.cached_property
    def again(self) -> Callable[[list[Any], object], Any]:
        """What calling the form does, quickly where the like of it was called before."""
        return compile_again(self.row, self._settled, self)

    def __call__(self, values: list[Any], stream: object) -> Any:
        """Check everything, and launch unless there is nothing to write."""
        settled, descs = self.check(values, stream)
        if type(stream) is Preparing:
            self.start(settled)
            return prepared(self.row, settled, values, descs, stream.stream)
        return None if settled.is_empty else self.launch(settled, values, stream)

    def launch(self, settled: Settled, values: list[Any], stream: object) -> Any:
        """Make a call that was checked."""
        on_stream = on(stream, settled.device, self.row.name)  # a missing one is told first
        self.start(settled)
        frame = settled.frame()
        try:
            return launch_fully(self.row, settled, frame, values, on_stream)
        finally:
            settled.frames.append(frame)

    def check(self, values: list[Any], stream: object) -> tuple[Settled, list[TensorDesc | None]]:
        """Raise unless all arguments fit; in `values` tensors become their addresses."""
        descs: list[TensorDesc | None] = []
        for i, arg in self._scratch:
            self._bring_scratch(i, arg, values, stream)
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
            values[i] = number(self.row.name, scalar, values[i])
        for i, text in self._texts:
            values[i] = word(self.row.name, text, values[i])
        for i, known in self._absent:
            values[i] = known
        settled = self._settle([None if desc is None else desc.layout for desc in descs], values)
        for i, scalar in self._handles:
            values[i] = values[i] or own_handle(scalar.library, settled.device)
        if self.row.together:
            check_together(self.row, descs, values)
        if not settled.is_empty:
            alignments = settled.checked.alignments
            for (_, arg), desc, alignment in zip(self._tensors, descs, alignments, strict=True):
                if desc is not None:
                    check_address(self.row.name, arg, desc, alignment)
        if self._has_relations:
            check_relations(self.row, settled, descs, values)
        return settled, descs

    def _bring_scratch(self, i: int, arg: Tensor, values: list[Any], stream: object) -> None:
        """Memory of the stream's own where the caller gives none, and else enough of it."""
        (first, other), name = self._first, self.row.name
        desc = values[first] = as_desc(values[first], name, other.name)
        if values[i] is not None:
            values[i] = as_desc(values[i], name, arg.name)
        sizes = self._shapes(values) if arg.bytes_for else {}
        try:
            values[i] = scratch_for(self.row, arg, desc.device, values[i], stream, sizes)
        except LoaderError:  # a device that is not there: another tensor may be elsewhere
            self._check_devices(values)
            raise

    def _check_devices(self, values: list[Any]) -> None:
        layouts: list[Layout | None] = []
        for i, arg in self._tensors:
            desc = None if values[i] is None else as_desc(values[i], self.row.name, arg.name)
            layouts.append(None if desc is None else desc.layout)
        check_device(self.row, layouts)

    def _shapes(self, values: list[Any]) -> dict[str, int]:
        """Sizes as the shapes tell them, which nobody has checked; 0 where they do not."""
        sizes: dict[str, int] = {}
        for i, arg in self._tensors:
            if arg.is_scratch:
                continue
            if values[i] is None and arg.optional:
                shape: tuple[int, ...] = ()
            else:
                values[i] = as_desc(values[i], self.row.name, arg.name)
                shape = values[i].shape
            for name, size in zip_longest(arg.axis_names, shape[: len(arg.axis_names)]):
                sizes.setdefault(name, size or 0)
        return sizes

    def _settle(self, layouts: list[Layout | None], values: list[Any]) -> Settled:
        kv_layout = "NHD"
        if self._kv_layout is not None:
            i, arg = self._kv_layout
            kv_layout = values[i]
            if type(kv_layout) is not str or kv_layout not in KV_LAYOUTS:
                got, expected = printed(kv_layout), " or ".join(map(repr, KV_LAYOUTS))
                raise ArgumentError(self.row.name, arg.name, got=got, expected=expected)
            values[i] = 0 if arg.strided else KV_LAYOUTS[kv_layout]
        key = (kv_layout, *layouts)
        settled = self._settled.get(key)
        if settled is None:
            checked = check_layouts(self.row, layouts, kv_layout, self.known)
            settled = Settled(self.row, checked, layouts, kv_layout)
            if len(self._settled) >= _CACHE_LIMIT:
                self._settled.clear()
            self._settled[key] = settled
        return settled

    def start(self, settled: Settled) -> None:
        """Find the entry that serves it, once."""
        if settled.entry is None:
            entry = entry_for(self.row, settled.device, self.module)
            settled.start(entry, self.row.name, self.module)

    def forget(self) -> None:
        """Drop what was learnt from earlier calls, after the source of kernels changed."""
        self._settled.clear()


def _binder(row: Row) -> Callable[..., tuple[list[Any], object]]:
    """A function with the op's own parameters that returns them as a list.

    Compiled, as dataclasses' `__init__` is: the interpreter then binds names and
    defaults, and its own TypeError names the op for a missing or unknown one.
    """
    names = ", ".join("None" if isinstance(arg, Absent) else arg.name for arg in row.args)
    source = f"def {row.name}({parameters(row)}):\n    return [{names}], stream\n"
    namespace: dict[str, Any] = {repr(REQUIRED): REQUIRED}
    exec(source, namespace)
    binder: Callable[..., tuple[list[Any], object]] = namespace[row.name]
    return binder
