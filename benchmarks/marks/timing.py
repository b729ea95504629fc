"""Nanoseconds a call, of sides that take turns: A B A B, in rounds."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice, repeat
from time import perf_counter_ns
from typing import Any

Run = Callable[[int], float]


@dataclass(frozen=True)
class Effort:
    """How often: `calls` of each side in each of the `rounds`.

    The GPU is waited for after every `chunk` of them, and that is not timed: a stream takes
    about 1024 launches before the next one waits, which would be the GPU's time and not
    the host's.  In a round the sides take turns chunk by chunk.
    """

    rounds: int = 7
    calls: int = 2000
    chunk: int = 200

    def chunks(self) -> Iterator[int]:
        for start in range(0, self.calls, self.chunk):
            yield min(self.chunk, self.calls - start)


@dataclass(frozen=True)
class Side:
    """One of those compared: `run(n)` makes n calls and returns the nanoseconds they took.

    `check()` makes a call and raises `Wrong` unless its result is right.
    """

    name: str
    run: Run
    check: Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """Nanoseconds a call in each round."""

    name: str
    rounds: tuple[float, ...]
    median: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "median", statistics.median(self.rounds))


def repeated(call: Callable[[], object]) -> Run:
    """The same call again and again.  The loop's own cost, some 10 ns, is counted."""

    def run(count: int) -> float:
        start = perf_counter_ns()
        for _ in repeat(None, count):
            call()
        return perf_counter_ns() - start

    return run


def with_drawn(loop: Callable[[list[Any]], object], draw: Callable[[int], list[Any]]) -> Run:
    """Calls whose arguments `draw(count)` makes just before, which is not timed."""

    def run(count: int) -> float:
        drawn = draw(count)
        start = perf_counter_ns()
        loop(drawn)
        return perf_counter_ns() - start

    return run


def with_turns(loop: Callable[[list[Any]], object], turns: Iterable[Any]) -> Run:
    """Calls with other arguments each time: `loop` is given as many of the turns as calls."""
    endless = cycle(turns)
    return with_drawn(loop, lambda count: list(islice(endless, count)))


def measure(
    sides: Sequence[Side], effort: Effort, settle: Callable[[], object]
) -> dict[str, Figure]:
    """Each side's figure, by name; results are checked before and after, warm-up is dropped.

    `settle()` waits for the GPU.
    """
    for side in sides:
        side.check()
    rounds: dict[str, list[float]] = {side.name: [] for side in sides}
    with _no_collection():
        for side in sides:
            side.run(min(effort.chunk, effort.calls))
            settle()
        for _ in range(effort.rounds):
            taken = dict.fromkeys(rounds, 0.0)
            for count in effort.chunks():
                for side in sides:
                    taken[side.name] += side.run(count)
                    settle()
            for name, total in taken.items():
                rounds[name].append(total / effort.calls)
    for side in sides:
        side.check()
    return {name: Figure(name, tuple(values)) for name, values in rounds.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
