"""Calls of every op that are made from rows alone: for the CPU and for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from fi_ffi.cli.cases import Case
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import EVERY_CALL, called
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.prepared_calls import EVERY_OP


def _calls() -> Iterator[Any]:
    """Every op in every dtype, small, and of usual sizes; and in every variant."""
    for call in EVERY_CALL:
        op, dtypes = call.values
        yield pytest.param(op, dtypes, "small", {}, id=call.id)
    for name, op in OPS.items():
        yield pytest.param(op, default_dtypes(op.row), "usual", {}, id=f"{name} usual")
    for variant in EVERY_OP:
        op, dtypes, more = variant.values
        if more and "in place" not in more:
            yield pytest.param(op, dtypes, "small", more, id=variant.id)


CALLS = list(_calls())


def draw(op: Op, dtypes: Mapping[str, str], sizes: str, more: Mapping[str, Any],
         rng: np.random.Generator) -> Case:  # fmt: skip
    return make_case(op.row, getattr(inputs_of(op.row), sizes), dtypes, rng, **more)


def check(case: Case, place: Callable[[np.ndarray], Any], stream: object = None) -> float:
    """Call an op with memory that `place` makes; the worst error as a fraction of its bound."""
    written = [arg.name for arg in case.row.tensors if arg.writes]
    op = OPS[case.row.name]
    got = called(op, case.arrays, place, written, **case.scalars, stream=stream)
    return max((case.error(name, got[name])[1] for name in case.expected), default=0.0)


def check_on(machine: Any, case: Case) -> float:
    """The same on one of `attention.machines`, where its kernels have the op."""
    machine.need(case.row)
    return check(case, machine.place, machine.stream)


def check_replayed(machine: Any, case: Case) -> float:
    """Recorded, what is only written poisoned, and made again, twice."""
    machine.need(case.row)
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}

    def launch() -> None:
        OPS[case.row.name](**descs, **case.scalars, stream=machine.stream)

    results = [arg.name for arg in case.row.tensors if arg.name in case.expected and not arg.reads]
    launch()
    machine.synchronize()
    replay = machine.capture(launch)
    worst = 0.0
    for _ in range(2):
        for name in results:
            machine.poison(placed[name], machine.stream)
        replay()
        machine.synchronize()
        worst = max(worst, *(case.error(name, placed[name].get())[1] for name in case.expected))
    assert all(array.intact() for array in placed.values())
    return worst


def needs(op: Op, machine: Any) -> None:
    """Skip on a GPU that is none of the kernel's."""
    able = op.row.capabilities
    if machine.is_gpu and able and of_loader.capability(0)[0] not in able:
        pytest.skip(f"{op.row.name} is for GPUs of compute capability {able}")
