"""Calls of every row of a family, made wrong: what a row says is all that is known of it."""

from __future__ import annotations

import importlib
import itertools
import numbers as numbers_
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.cli.cases import case_of
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import KvLayout, Row, Scalar, Tensor

from .guard import check_refusal, kernels_run, stopped
from .memory import Room
from .wrong import ALONE, ALWAYS, Wrong, another, built, told, wrong_tensor, wrong_value
from tests.helpers.calls import lacks
from tests.helpers.cases import make_case
from tests.helpers.inputs import inputs_of

_MOST = 3  # arguments at once
_SLOW = 0.02  # seconds of a call, past which only one in so many that fit is made
_ONE_IN = 25


def rows_of(family: str, first_only: bool = False) -> list[Row]:
    """The rows of a family, of every release or of the default one."""
    rows: tuple[Row, ...] = importlib.import_module(f"fi_ffi.ops.table.{family}").ROWS
    groups = itertools.groupby(rows, lambda row: row.name)
    return [row for _, of_op in groups for row in (list(of_op)[:1] if first_only else of_op)]


def variants(row: Row) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    if any(isinstance(arg, KvLayout) for arg in row.args):
        found.append({"kv_layout": "HND"})
    names = {arg.name for arg in row.args} | {"without"}
    more = [dict(value) for value in (inputs_of(row).variants or {}).values()]
    return found + [value for value in more if value.keys() <= names]  # older rows have fewer


class Call:
    """A right call of a row in a room of its own."""

    stream: Any = None

    def __init__(self, row: Row, rng: random.Random, place: Callable[..., Any] = Room) -> None:
        self.row, self.op = row, Op(row)
        choices = [
            dict(zip(row.dtypes, names, strict=True))
            for names in itertools.product(*row.dtypes.values())
        ]
        dtypes = rng.choice([one for one in choices if not lacks(row, one)])
        numbers = np.random.default_rng(rng.randrange(2**63))
        case = make_case(row, inputs_of(row).small, dtypes, numbers, **rng.choice(variants(row)))
        self.room = place(case.arrays)
        self.descs, self.scalars = self.room.descs(), case.scalars
        self.tensors = {arg.name: arg for arg in row.tensors}
        started = time.perf_counter()
        assert self.attempt(self.values, True, False)
        self.turns = itertools.count()
        self.is_slow = time.perf_counter() - started > _SLOW
        self.check(self.values)

    @property
    def values(self) -> dict[str, Any]:
        return {**self.descs, **self.scalars}

    def check(self, values: dict[str, Any]) -> None:
        """Nothing but elements of results was written; and they are right, where what was read
        is the case's.  The room is as before afterwards."""
        given = {name: one for name, one in values.items() if isinstance(one, fi_ffi.TensorDesc)}
        written = [desc for name, desc in given.items() if self.tensors[name].writes]
        outside = self.room.changed_outside(written)
        assert not outside, f"{outside} bytes were written that are no element of a result"
        if self._is_plain(values) and not self.overlap(given):
            self._check_results(values, given)
        self.room.restore()

    def _is_plain(self, values: dict[str, Any]) -> bool:
        """Whether all that is read are elements that the case has, and numbers are of usual size:
        anything else is no number, or past what the bounds of errors are for."""
        for name, own in self.descs.items():
            desc = values.get(name)
            if desc is None or not self.tensors[name].reads:
                continue
            both = zip(desc.shape, own.shape, desc.strides, own.strides, strict=False)
            within = all(n <= most and (n < 2 or step == of) for n, most, step, of in both)
            if desc.ptr != own.ptr or desc.dtype is not own.dtype or not within:
                return False
        numbers = [
            value
            for name, value in values.items()
            if isinstance(value, numbers_.Real) and value is not self.scalars.get(name)
        ]
        return all(value == 0 or 1e-4 < abs(value) < 1e4 for value in numbers)

    def _check_results(self, values: dict[str, Any], given: dict[str, fi_ffi.TensorDesc]) -> None:
        row = self.row
        arrays = {name: self.room.view(desc, before=True) for name, desc in given.items()}
        others = {arg.name: values.get(arg.name) for arg in row.given if arg.name not in arrays}
        for arg in row.given:
            if isinstance(arg, Scalar) and others[arg.name] is not None:
                others[arg.name] = arg.type(others[arg.name])
        others = {name: value for name, value in others.items() if name not in self.tensors}
        with np.errstate(all="ignore"):
            case = case_of(row, arrays, others)
        for name in case.expected:
            if name in given:
                worst = case.error(name, self.room.view(given[name]))[1]
                assert worst <= 1, f"{name} is {worst} of its bound off"

    def overlap(self, given: dict[str, fi_ffi.TensorDesc]) -> bool:
        """Whether something written may share memory with another."""
        spans = [
            (desc.ptr, desc.ptr + desc.span_bytes, self.tensors[name].writes)
            for name, desc in given.items()
        ]
        return any(
            (one[2] or other[2]) and one[0] < other[1] and other[0] < one[1]
            for one, other in itertools.combinations(spans, 2)
        )

    def can_run(self, values: dict[str, Any]) -> bool:
        """Whether a kernel that is given this sees indices that fit, and memory that is there."""
        given = {name: values[name] for name in self.tensors if values.get(name) is not None}
        for value in given.values():
            if type(value) is not fi_ffi.TensorDesc or not self.room.holds(value):
                return False
        indices = [
            name
            for name, own in self.descs.items()
            if self.tensors[name].reads and own.dtype.name in ("int32", "int64", "uint32")
        ]
        if not indices:
            return True
        # What they count in has the size that they were made for, and stays as it is.
        owned = {name: desc for name, desc in given.items() if name in self.descs}
        same_shapes = all(desc.shape == self.descs[name].shape for name, desc in owned.items())
        same_indices = all(
            (owned[name].ptr, owned[name].layout) == (self.descs[name].ptr, self.descs[name].layout)
            for name in indices
            if name in owned
        )
        return same_shapes and same_indices and not self.overlap(given)

    def attempt(self, values: dict[str, Any], runs: bool, prepare: bool) -> bool:
        """Make a call, or let it come as far as its kernel; whether it was made."""
        try:
            with kernels_run(runs):
                if prepare:
                    self.op.prepare(**values)()
                else:
                    self.op(**values)
        except fi_ffi.KernelError as error:
            assert stopped(error), error
            return False
        return runs

    # What is wrong.

    def draw(self, rng: random.Random) -> dict[str, Wrong]:
        count = 1 if rng.random() < 0.7 else rng.randint(2, _MOST)
        args = rng.sample(self.row.given, min(count, len(self.row.given)))
        return {arg.name: self._wrong(rng, arg) for arg in args}

    def _wrong(self, rng: random.Random, arg: Any) -> Wrong:
        if not isinstance(arg, Tensor):
            return wrong_value(rng, arg)
        desc = self.descs.get(arg.name)
        if desc is None:  # optional, and not there
            wrong = wrong_tensor(rng, next(iter(self.descs.values())))
            return Wrong(f"not there: {wrong.what}", wrong.make)
        if rng.random() < 0.1:
            return another(rng, arg.name, self.descs)
        return wrong_tensor(rng, desc, arg, self.row)

    def must_refuse(self, wrong: dict[str, Wrong]) -> bool:
        return any(
            one.refused == ALWAYS or (one.refused == ALONE and len(wrong) == 1)
            for one in wrong.values()
        )


def one_call(call: Call, rng: random.Random, tell: Callable[[str], None]) -> str:
    """One wrong call by a way that is drawn; what became of it."""
    wrong = call.draw(rng)
    way = rng.choice(["call", "call", "call", "prepare", "update"])
    tell(f"{call.row.name} of {call.row.releases}, {way}: {told(wrong)}")
    values = built(wrong)
    if values is None:
        return "no descriptor"
    if way == "update":
        return _update(call, values, wrong)
    return _call(call, values, call.must_refuse(wrong), way == "prepare")


def _call(call: Call, changes: dict[str, Any], must: bool, prepare: bool) -> str:
    values = {**call.values, **changes}
    runs = call.can_run(values) and not (call.is_slow and next(call.turns) % _ONE_IN)
    try:
        made = call.attempt(values, runs, prepare)
    except fi_ffi.ArgumentError as error:
        check_refusal(error, [call.row.name], {*(arg.name for arg in call.row.given), "stream"})
        assert call.room.is_untouched(), "something was written by a call that was refused"
        return "refused"
    assert not must, "this was not refused"
    if not made:
        assert call.room.is_untouched()
        return "fits"
    call.check(values)
    return "right"


def _update(call: Call, values: dict[str, Any], wrong: dict[str, Wrong]) -> str:
    from tests.helpers.prepared_calls import frame_of

    made = call.op.prepare(**call.values, stream=call.stream)
    before = frame_of(made)
    try:
        made.update(**values)
    except fi_ffi.ArgumentError as error:
        check_refusal(error, [call.row.name], [arg.name for arg in call.row.given])
        assert frame_of(made) == before, "an update that was refused changed something"
        if not (call.is_slow and next(call.turns) % _ONE_IN):
            made()
            call.check(call.values)
        return "update refused"
    assert not _is_never_updated(call, values, wrong), "this was not refused"
    assert call.room.is_untouched()
    return "updated"


def _is_never_updated(call: Call, values: dict[str, Any], wrong: dict[str, Wrong]) -> bool:
    """An int that is no tensor of a call is an address of an update; not that of nothing."""
    tensors = [name for name in values if name in call.descs and type(values[name]) is int]
    others = {name: one for name, one in wrong.items() if name not in tensors}
    return call.must_refuse(others) or any(values[name] == 0 for name in tensors)
