"""Timing: calls take turns in every round, so that what slows the machine slows all of them."""

from __future__ import annotations

import contextlib
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import fi_ffi

STREAM = 77  # a handle that nothing is ever launched on


@dataclass(frozen=True)
class Call:
    """One way of calling: a statement, and what makes the names in it.

    `problem` checks the way of calling with kernels of its own and tells what is wrong, or None.
    """

    name: str
    statement: str
    make: Callable[[], Mapping[str, Any]]
    problem: Callable[[], str | None]
    # Made inside `fi_ffi.stream(STREAM)`.
    is_scoped: bool = False
    # Another package's call, that fi_ffi's are compared with.
    is_peer: bool = False
    # The call that repeats one length, where this one has another length each time.
    repeated: str | None = None

    @cached_property
    def names(self) -> dict[str, Any]:
        """The names in the statement, made once."""
        return {**self.make()}

    def scope(self) -> contextlib.AbstractContextManager[object]:
        return fi_ffi.stream(STREAM) if self.is_scoped else contextlib.nullcontext()


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
        call.name: timeit.Timer(call.statement, timer=time.thread_time, globals=call.names)
        for call in calls
    }
    for i in range(rounds):
        for timing in timings if i % 2 == 0 else reversed(timings):
            timer = timers[timing.call.name]
            with timing.call.scope():
                timer.timeit(1)  # which puts the scope's stream in place
                timing.rounds.append(timer.timeit(number) / number * 1e9)
    return timings
