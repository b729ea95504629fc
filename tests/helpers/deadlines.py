"""Exceptions that a timer's signal handler raises anywhere in some work."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable


class Interrupt(KeyboardInterrupt):
    pass


class Deadline(TimeoutError):
    pass


def check_arrival(
    work: Callable[[], object],
    rounds: int,
    rng: random.Random,
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """An exception of a handler that interrupts the work comes out as itself, each time.

    `prepare` is called before each, and not interrupted.
    """
    for kind in (Interrupt, Deadline):
        arrived = _raised_by(kind, work, rounds, rng, prepare)
        assert [*arrived] == [repr(kind("of the handler"))], (kind, work, arrived)


def _raised_by(
    kind: type[BaseException],
    work: Callable[[], object],
    rounds: int,
    rng: random.Random,
    prepare: Callable[[], object],
) -> Counter[str]:
    """Count what arrives of an exception that the handler raises once in each round."""

    def handler(number: int, frame: object) -> None:
        raise kind("of the handler")

    before = signal.signal(signal.SIGALRM, handler)
    prepare()
    work()
    prepare()
    start = time.perf_counter()
    work()
    most = 1.2 * (time.perf_counter() - start)
    arrived: Counter[str] = Counter()
    for _ in range(rounds):
        prepare()
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, most))
            end = time.monotonic() + 30
            work()
            while time.monotonic() < end:
                pass
            arrived["nothing"] += 1
            break
        except BaseException as error:
            arrived[repr(error)[:200]] += 1
    signal.signal(signal.SIGALRM, before)
    return arrived
