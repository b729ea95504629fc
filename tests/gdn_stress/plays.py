"""Lanes played alone and together, and what comes out compared: with float64, and bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from tests.gdn_stress.lanes import Arrays, Lane, make_case
from tests.gdn_stress.machines import Cpu

# How far what a head of a sequence reads, and its state, may be from float64, as norms: steps
# of the dtype, of its own norm.  The bound of each element is for the worst of roundings,
# which hardly ever come together: a scale that is 5 % off would be within it.  Of a chain that
# float64 follows from its first state on, what the steps add fades as the state does.
ONE_STEPS, CHAIN_STEPS = 2, 2
# Of the magnitude: what is smaller is not held to its own norm.
FLOOR = 2.0**-9


def alone(lane: Lane) -> list[Arrays]:
    """What each launch writes when it is waited for before the next one is made."""
    lane.reset()
    found = []
    with lane.machine.watched():
        for step in range(lane.steps):
            lane.launch(step)
            lane.machine.settle()
            found.append(lane.read(step) | lane.read_state(step))
    return found


def together(
    machine: Cpu, lanes: Sequence[Lane], threads: bool = False, every_call: bool = True
) -> list[list[Arrays]]:
    """What the launches write when none is waited for: one of each lane in turn, or a thread
    for each lane.

    A watched call has its stream write a mark after it; without `every_call` only the last
    launch of each lane is watched, and nothing lies between the others.
    """
    for lane in lanes:
        lane.reset()
    with contextlib.ExitStack() as stack:
        if every_call:
            stack.enter_context(machine.watched())
        machine.gate([*{lane.stream: None for lane in lanes}])
        _launch(lanes, threads)
        if not every_call:
            stack.enter_context(machine.watched())
        for lane in lanes:
            lane.launch(lane.steps - 1)
    return [[lane.read(step) for step in range(lane.steps)] for lane in lanes]


def _launch(lanes: Sequence[Lane], threads: bool) -> None:
    """All but the last launch of each lane."""

    def run(lane: Lane) -> None:
        for step in range(lane.steps - 1):
            lane.launch(step)

    if threads:
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run, lanes))
        return
    for step in range(max(lane.steps for lane in lanes)):
        for lane in lanes:
            if step < lane.steps - 1:
                lane.launch(step)


def check_same(lane: Lane, found: Sequence[Arrays], expected: Sequence[Arrays], how: str) -> None:
    """Bit for bit, all that is still there."""
    for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        for name, array in got.items():
            wrong = np.argwhere(bits(array) != bits(wanted[name]))
            if len(wrong):
                told = f"{len(wrong)} of {array.size} elements differ, the first at {wrong[0]}"
                raise AssertionError(f"{how}, launch {step}, {name}: {told}; {lane.spec}")


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def check_exact(lane: Lane, found: Sequence[Arrays], steps: int | None = None) -> float:
    """The largest error as a fraction of its bound, of the first so many launches (all).

    A chain's are held against float64 from the state that the launch really was given.
    """
    worst, cases = 0.0, {}
    for step, got in enumerate(found[:steps]):
        arrays, scalars = lane.drawn_of(step)
        case = cases.get(step % len(lane.drawn))
        if case is None or (lane.spec.chained and step):
            if lane.spec.chained and step:
                arrays = arrays | {"input_state": found[step - 1]["output_state"]}
            case = cases[step % len(lane.drawn)] = make_case(lane.machine, arrays, scalars)
        starts = arrays["cu_seqlens"][:-1]
        for name, exact in case.expected.items():
            absolute, relative = case.error(name, got[name])
            told = f"launch {step}, {name}: {absolute:.3g} away, {relative:.3g} of its bound"
            assert relative <= 1, f"{told}; {lane.spec}"
            part = _away(lane, got[name], exact, starts if name == "output" else None) / ONE_STEPS
            assert part <= 1, f"launch {step}, {name}: {part:.3g} of its norm's bound; {lane.spec}"
            worst = max(worst, relative, part)
    return worst


def check_chain(lane: Lane, found: Sequence[Arrays]) -> float:
    """A whole chain against float64, which carries a state of its own.

    The largest distance, as a fraction of what is allowed.
    """
    state, worst = lane.drawn[0][0]["input_state"].astype(np.float64), 0.0
    for step, got in enumerate(found):
        arrays, scalars = lane.drawn_of(step)
        exact = make_case(lane.machine, arrays | {"input_state": state}, scalars).expected
        state = exact["output_state"][0]
        for name, starts in (("output", arrays["cu_seqlens"][:-1]), ("output_state", None)):
            part = _away(lane, got[name], exact[name], starts) / CHAIN_STEPS
            assert part <= 1, f"step {step}, {name}: {part:.3g} of its norm's bound; {lane.spec}"
            worst = max(worst, part)
    return worst


def _away(
    lane: Lane,
    got: np.ndarray,
    exact: tuple[np.ndarray, np.ndarray | None],
    starts: np.ndarray | None,
) -> float:
    """The largest norm of a difference as a fraction of what it should be, in steps of the dtype.

    For each row's heads, or for those of the rows from each start to the next.
    """
    value, magnitude = exact
    assert magnitude is not None
    if not got.size:
        return 0.0
    squares = [
        np.square(x).reshape(*x.shape[:2], -1).sum(axis=2)
        for x in (got.astype(np.float64) - value, value, FLOOR * magnitude)
    ]
    if starts is not None:
        squares = [np.add.reduceat(x, starts) for x in squares]
    difference, whole, floor = squares
    step = float(ml_dtypes.finfo(lane.drawn[0][0]["q"].dtype).eps)
    return float(np.sqrt(difference / (whole + floor)).max()) / step


def check(
    machine: Cpu, lanes: Sequence[Lane], threads: bool = False, exact_steps: int | None = None
) -> None:
    """Lanes alone against float64, then twice together, bit for bit as they were alone.

    Reports the largest error as a fraction of its bound.
    """
    expected = [alone(lane) for lane in lanes]
    errors = [
        check_exact(lane, found, exact_steps) for lane, found in zip(lanes, expected, strict=True)
    ]
    machine.report("error_of_bound", max(errors))
    for every_call in (True, False):
        found_ones = together(machine, lanes, threads, every_call)
        for lane, found, wanted in zip(lanes, found_ones, expected, strict=True):
            check_same(lane, found, wanted, f"together, {every_call=}")
    for lane in lanes:
        lane.check_intact()
