"""Limits of sizes and numbers: those that a row's conditions have, and values at each of others.

Tensors lie at addresses that nothing is at: what is told of them is told before memory is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fi_ffi
from fi_ffi.ops.call.notation import Condition, parse_axis
from fi_ffi.ops.call.row import Row, Tensor

from tests.helpers.cases import default_dtypes

_NUMBERS = re.compile(r"\(?\d+(, \d+)*,?\)?")


def limits(row: Row, kind: str) -> dict[str, tuple[int, ...]]:
    """The numbers with which ">=", "<=", "in" or "%" compares sizes, by size."""
    each = map(_limit, row.conditions)
    return {limit[1]: limit[2] for limit in each if limit and limit[0] == kind}


def _limit(condition: Condition) -> tuple[str, str, tuple[int, ...]] | None:
    axis, numbers = condition.left, condition.right
    if condition.guard or not _NUMBERS.fullmatch(numbers) or not axis.isidentifier():
        return None
    return condition.operator, axis, tuple(map(int, re.findall(r"\d+", numbers)))


def laid_out(
    row: Row, tensors: Iterable[Tensor], sizes: Mapping[str, int], changes: Mapping[str, Any]
) -> dict[str, fi_ffi.TensorDesc | None]:
    """Tensors of these sizes side by side, but for changes of dtypes, and of a tensor's fields.

    A tensor that is said to be another one is that one; of None there is none.
    """
    dtypes = {name: changes.get(name, dtype) for name, dtype in default_dtypes(row).items()}
    descs: dict[str, fi_ffi.TensorDesc | None] = {}
    address = 1 << 30
    for arg in tensors:
        shape = [parse_axis(axis).size(sizes) for axis in arg.axis_names]
        apart = shape[: len(shape) - arg.broadcast]
        steps = [math.prod(apart[k + 1 :]) * arg.parts for k in range(len(apart))]
        if apart:
            steps[-1] = 1
        if arg.transposed:
            steps[-2:] = [1, shape[-2]]
        steps += [0] * arg.broadcast
        fields = {"dtype": dtypes.get(arg.dtype, arg.dtype), "shape": shape, "strides": steps}
        changed = changes.get(arg.name)
        if isinstance(changed, dict):
            fields |= ({"strides": None} if "shape" in changed else {}) | changed
        desc = fi_ffi.TensorDesc(**{"ptr": address, "device": "cpu"} | fields)
        descs[arg.name] = desc
        address += (desc.span_bytes + 8192) & ~4095
    for name in descs:
        other = changes.get(name, name)
        if other is None or isinstance(other, str):
            descs[name] = other and descs[other]
    return descs


@dataclass(frozen=True)
class Floats:
    """Numbers from `low` to `high`; without one, all that are finite."""

    low: float
    high: float = math.inf


Values = range | tuple[int, ...] | Floats
FAR = 2**62  # a range up to here has no end


@dataclass(frozen=True)
class Bound:
    """What a size or a number may be in calls with `beside`, whose functions are of its value.

    `releases` is a specifier.  Errors name it, and one of the numbers that bound it, unless they
    have words of their own, `says`.
    """

    ops: str | tuple[str, ...] | list[str]
    name: str
    values: Values
    beside: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    releases: str = ""

    def changes(self, value: Any) -> dict[str, Any]:
        each = self.beside.items()
        beside = {name: made(value) if callable(made) else made for name, made in each}
        return {**beside, self.name: value}

    @property
    def taken(self) -> list[Any]:
        """The first and the last values, and those next to them."""
        if isinstance(self.values, tuple):
            return [*self.values]
        if isinstance(self.values, Floats):
            low, high = self.values.low, self.values.high
            return [low, math.nextafter(low, high), min(low + 1.0, high)]
        first, last = [*self.values[:2]], [*self.values[-2:]]
        return first if self.values.stop == FAR else [*dict.fromkeys(first + last)]

    @property
    def refused(self) -> list[Any]:
        """Those just outside, by one, half a step and a step, and those beside a step."""
        if isinstance(self.values, Floats):
            low, high = self.values.low, self.values.high
            outside = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
            return [*outside, -1.0, -math.inf, math.inf, math.nan]
        step = self.values.step if isinstance(self.values, range) else 1
        near = [
            end + off for end in self.taken for off in (-step, -step // 2, -1, 1, step // 2, step)
        ]
        near += [min(self.taken) + max(self.taken)] if isinstance(self.values, tuple) else []
        least = min(*self.taken, 0)
        return [n for n in dict.fromkeys(near) if n not in self.values and n >= least - step]

    @property
    def words(self) -> str:
        """What an error has of the limits, one of which it names."""
        if self.says:
            return self.says
        if isinstance(self.values, Floats):
            return rf"\b{self.values.low:g}\b|{self.values.low}|{self.values.high}|a finite number"
        stated = (
            self.values
            if isinstance(self.values, tuple)
            else (self.values[0], self.values.stop - 1, self.values.step)
        )
        return "|".join([*(rf"\b{number}\b" for number in stated), "of at least 1$"])


Judge = Callable[[Mapping[str, Any]], fi_ffi.ArgumentError | None]


def misjudged(row: Row, bound: Bound, judge: Judge) -> Iterator[str]:
    """Tell of values at a bound that are refused, and of values beyond it that are not, or not by
    the name of the size, of the number or of a tensor that has it, and the limit.

    `judge` gives what is said of a call with the changes.
    """
    axes = {arg.name: arg.axis_variables for arg in row.tensors}
    is_size = any(bound.name in variables for variables in axes.values())
    for value in bound.taken:
        error = judge(bound.changes(value))
        if error is not None:
            yield f"{bound.name} = {value}: {error}"
    for value in bound.refused:
        if is_size and value < 0:
            continue  # no tensor has it
        error = judge(bound.changes(value))
        told = str(error)
        is_named = error and (bound.name in told or bound.name in axes.get(error.argument, ()))
        if not is_named or not re.search(bound.words, told):
            yield f"{bound.name} = {value}: {told}"


def unbounded(row: Row, bounds: Iterable[Bound]) -> Iterator[str]:
    """Tell of limits that a row states and none of the bounds is about: conditions and rules that
    compare numbers, those of a number, and of scratch memory."""
    having = {bound.name for bound in bounds}
    for condition in row.conditions:
        names = {condition.left} if condition.left.isidentifier() else {*condition.names}
        if not names & having:
            yield condition.text
    for rule in row.rules:
        has_numbers = re.search(r"(?<![\w.])\d", rule.condition) or rule.using
        if has_numbers and not {*rule.names} & having:
            yield rule.condition
    for arg in row.args:
        if isinstance(arg, Tensor):
            is_told = not arg.is_scratch or arg.any_size or {*arg.axis_names} <= having
        else:
            limits = getattr(arg, "low", None), getattr(arg, "high", None)
            is_told = limits == (None, None) or arg.name in having
        if not is_told:
            yield arg.name
