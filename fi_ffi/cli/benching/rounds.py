"""Timing: calls take turns in every round, so that what slows the machine slows all of them."""

from __future__ import annotations

import contextlib
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import fi_ffi

STREAM = 77  # a handle that nothing is ever launched on


@dataclass(frozen=True)
class Call:
    """One way of calling: a statement, and the names in it.

    `before` checks results with a kernel that has some, and `after`, once it was timed, what
    the entry was given.  Each tells what is wrong, or None.
    """

    name: str
    statement: str
    names: Mapping[str, Any]
    after: Callable[[], str | None]
    before: Callable[[], str | None] = lambda: None
    # Made inside `fi_ffi.stream(STREAM)`.
    is_scoped: bool = False
    # Another package's call, that fi_ffi's are compared with.
    is_peer: bool = False

    def scope(self) -> contextlib.AbstractContextManager[object]:
        return fi_ffi.stream(STREAM) if self.is_scoped else contextlib.nullcontext()

    def once(self) -> None:
        """Make it once."""
        with self.scope():
            exec(compile(self.statement, "<call>", "exec"), {**self.names})


@dataclass(frozen=True)
class Timing:
    """A call's nanoseconds in each round."""

    call: Call
    rounds: list[float] = field(default_factory=list)

    @property
    def nanoseconds(self) -> float:
        return median(self.rounds)

    def ratio(self, other: Timing) -> float:
        """How many times as long as another, of the same rounds."""
        return median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def measure(calls: Sequence[Call], rounds: int, number: int) -> list[Timing]:
    """Each call's time in `rounds` rounds of `number` calls, forwards and backwards in turn."""
    timings = [Timing(call) for call in calls]
    # Time of this thread's own: nothing is waited for, and others may want the processor.
    timers = {
        call.name: timeit.Timer(call.statement, timer=time.thread_time, globals={**call.names})
        for call in calls
    }
    for i in range(rounds):
        for timing in timings if i % 2 == 0 else reversed(timings):
            timer = timers[timing.call.name]
            with timing.call.scope():
                timer.timeit(1)  # which puts the scope's stream in place
                timing.rounds.append(timer.timeit(number) / number * 1e9)
    return timings
