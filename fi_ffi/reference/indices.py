"""The places that integers of a tensor may name, as rows state them (`Tensor.index`).

A GPU's kernels read and write wherever an index says. Here an index outside its tensor is refused
before anything is written. This is the one place where indices are judged; what a kernel gives a
meaning of its own, such as a padding of -1, a condition leaves out.

A condition is `LOW <= PLACES < HIGH`, or one half of it, for each element; `<=` and `<` may be
either. Its parts are Python expressions of the row's sizes, scalars and tensors; `steps` are the
differences of neighbours, `columns` the numbers of a table's columns, and `clip` is numpy's. Other
functions are facts of a run's plan (`fi_ffi.reference.attention.planned`). After `where`, an
expression says which elements the kernel reads: all tensors with the axes of those in it, lookups
aside, are reduced to them.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call.notation import parse_axis, parse_expression
from fi_ffi.ops.call.row import KV_LAYOUTS, KvLayout, Row, Tensor
from fi_ffi.reference.arrays import Array

# Finds what conditions name beside arguments and sizes, from these by name.
Facts = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_HOLDS = {"<=": np.less_equal, "<": np.less}
_LOW = {"<=": "{} or more", "<": "more than {}"}
_HIGH = {"<=": "{} or less", "<": "less than {}"}


@dataclass(frozen=True)
class Bound:
    """One half of a condition: the other side of the places, and how they compare."""

    other: str
    sign: str
    is_low: bool

    def holds(self, places: Array, other: Any) -> Array:
        pair = (other, places) if self.is_low else (places, other)
        right: Array = np.broadcast_to(_HOLDS[self.sign](*pair), places.shape)
        return right

    def expected(self, limit: int) -> str:
        shown = self.other if self.other == str(limit) else f"{self.other} = {limit}"
        return (_LOW if self.is_low else _HIGH)[self.sign].format(shown)


@dataclass(frozen=True)
class Places:
    """A condition of a tensor's argument."""

    argument: str
    text: str
    places: str
    bounds: tuple[Bound, ...]
    where: str

    @classmethod
    @functools.cache
    def of(cls, argument: str, text: str) -> Places:
        condition, _, where = text.partition(" where ")
        parts = re.split(r" (<=|<) ", condition)
        at = next(i for i, part in enumerate(parts) if argument in parse_expression(part)[1])
        bounds = []
        if at:
            bounds.append(Bound(parts[0], parts[1], is_low=True))
        if parts[at + 1 :]:
            bounds.append(Bound(parts[-1], parts[-2], is_low=False))
        return cls(argument, text, parts[at], tuple(bounds), where)

    @property
    def lookups(self) -> tuple[int, int]:
        """How deep the condition's lookups into tensors are nested, and how many there are.

        What a lookup needs is judged first: it is less deep.
        """
        depths = itertools.accumulate({"[": 1, "]": -1}.get(sign, 0) for sign in self.text)
        return max(depths), self.text.count("[")

    def judge(self, row: Row, known: Mapping[str, Any]) -> None:
        """Raise for the first element that does not fulfil the condition."""
        kept, read = known, None
        if self.where:
            read = np.asarray(_value(self.where, known))
            axes = {_axes_of(arg, self.where) for arg in row.tensors}
            kept = {
                **known,
                **{
                    arg.name: known[arg.name][read]
                    for arg in row.tensors
                    if arg.axes in axes and np.shape(known.get(arg.name, ())) == read.shape
                },
            }
        places = np.asarray(_value(self.places, kept))
        for bound in self.bounds:
            other = _value(bound.other, kept)
            right = bound.holds(places, other)
            if not right.all():
                at = np.unravel_index(int(np.argmin(right)), right.shape)
                limit = int(np.broadcast_to(other, places.shape)[at])
                told = self._told(int(places[at]), at if read is None else np.argwhere(read)[at])
                raise refusal(self.argument, told, bound.expected(limit))

    def _told(self, place: int, at: Any) -> str:
        """Return the words for a wrong place, which an element has."""
        of = "" if self.places == self.argument else f"{self.places} = "
        where = ", ".join(str(int(i)) for i in np.ravel(at))
        return f"{of}{place}{f' in element {where}' if where else ''}"


def refusal(argument: str, got: str, expected: str) -> ArgumentError:
    """Return the error for a place that there is not, which a call raises with its own names."""
    error = ArgumentError("", argument, got=got, expected=expected)
    error.is_of_kernel = True
    return error


def check_slot(argument: str, request: int, slot: int, count: int) -> None:
    """Refuse a request's slot of states, if there are fewer; for rows whose indices mean more than
    a condition can say."""
    if not 0 <= slot < count:
        expected = f"0 or more, and less than {count}"
        raise refusal(argument, f"{slot} for request {request}", expected)


def _columns(table: Array) -> Array:
    return np.broadcast_to(np.arange(table.shape[-1]), table.shape)


_FUNCTIONS = {"steps": np.diff, "columns": _columns, "clip": np.clip}


def _value(text: str, known: Mapping[str, Any]) -> Any:
    return eval(text, {"__builtins__": {}, **_FUNCTIONS}, dict(known))


def _axes_of(arg: Tensor, where: str) -> str:
    """Return the axes of the elements that a tensor in `where` is about, "" for another."""
    if f"steps({arg.name})" in where:
        return arg.axes.removesuffix("+1")
    is_meant = arg.name in parse_expression(where)[1] and f"{arg.name}[" not in where
    return arg.axes if is_meant else ""


def judged(
    kernel: Callable[..., Any], row: Row | None, facts: Facts | None = None
) -> Callable[..., Any]:
    """Wrap a kernel on arrays so that it refuses indices outside their tensors."""
    if row is None:
        return kernel

    @functools.wraps(kernel)
    def call(*values: Any) -> Any:
        judge(row, {arg.name: value for arg, value in zip(row.args, values, strict=True)}, facts)
        return kernel(*values)

    return call


def judge(row: Row, given: Mapping[str, Any], facts: Facts | None = None, **sizes: int) -> None:
    """Refuse indices outside their tensors in a call's arrays and scalars.

    `sizes` are those that no tensor of the row has; `facts` finds what else the conditions name.
    """
    conditions = _conditions(row)
    known = {**sizes_of(row, given), **sizes, **given}
    if facts is not None:
        known |= facts(known)
    for name in {name for each in conditions for name in parse_expression(each.text)[1]}:
        if isinstance(known.get(name), np.ndarray):
            known[name] = known[name].astype(np.int64)
    for condition in conditions:
        if given[condition.argument] is not None:
            condition.judge(row, known)


@functools.cache
def _conditions(row: Row) -> list[Places]:
    found = [Places.of(arg.name, text) for arg in row.tensors for text in arg.index]
    return sorted(found, key=lambda condition: condition.lookups)


def sizes_of(row: Row, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a call's axes, from its arrays."""
    sizes: dict[str, int] = {}
    merged: list[tuple[Sequence[str], int]] = []
    layout = "NHD"
    if isinstance(row.kv_layout, KvLayout) and not row.kv_layout.strided:
        codes = {code: word for word, code in KV_LAYOUTS.items()}
        layout = codes[int(given[row.kv_layout.name])]
    for arg in row.tensors:
        array = given.get(arg.name)
        if array is None:
            continue
        for texts, size in zip(_entry_axes(arg, layout), array.shape, strict=True):
            axis = parse_axis(texts[0])
            if len(texts) > 1:
                merged.append((texts, size))
            elif len(axis.terms) == 1 and axis.over == 1:
                ((name, times),) = axis.terms
                sizes[name] = (size - axis.more) // times
    for texts, size in merged:
        unknown = [text for text in texts if text.isidentifier() and text not in sizes]
        known = math.prod(parse_axis(text).size(sizes) for text in texts if text not in unknown)
        if len(unknown) == 1 and known:
            sizes[unknown[0]] = size // known
    return sizes


def _entry_axes(arg: Tensor, layout: str) -> Sequence[Sequence[str]]:
    """Return the axes that an entry gets, each as those that it merges."""
    axes = arg.axes_in(layout)
    return [[axes[i] for i in of] for of in arg.view] if arg.view else [[axis] for axis in axes]
