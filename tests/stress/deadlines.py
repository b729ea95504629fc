"""Calls that the exception of a timer's signal meets anywhere; each one has to arrive as itself."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter

import numpy as np

import fi_ffi

x, w, y = np.ones((4, 64), np.float16), np.ones(64, np.float16), np.empty((4, 64), np.float16)


class Interrupt(KeyboardInterrupt):
    pass


class Deadline(TimeoutError):
    pass


class ByCapsule:
    def __dlpack_device__(self):
        return x.__dlpack_device__()

    def __dlpack__(self, **how):
        return x.__dlpack__(**how)


class ByInterface:
    @property
    def __array_interface__(self):
        return w.__array_interface__


every, prepared = fi_ffi.module(sys.argv[1]), fi_ffi.rmsnorm.prepare(y, x, w)


def of_ops():
    fi_ffi.rmsnorm(y, x, w)
    fi_ffi.rmsnorm(y, ByCapsule(), ByInterface())
    prepared()


def of_modules():
    every.apply(lambda *parts: len(parts), [1, 2.5, "x" * 30])
    assert every.counter(1).add(3) == 4
    np.asarray(every.make_tensor((3,), "float32", "cpu"))
    every.same_tensor(ByCapsule()).desc.at(0)


def raised_by(kind: type[BaseException], work, rounds: int, rng: random.Random) -> Counter[str]:
    """Count what arrives of an exception that the handler raises once in each round."""

    def handler(number, frame):
        raise kind("of the handler")

    before = signal.signal(signal.SIGALRM, handler)
    work()
    start = time.perf_counter()
    work()
    most = 1.2 * (time.perf_counter() - start)
    arrived: Counter[str] = Counter()
    for _ in range(rounds):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, most))
            end = time.monotonic() + 30
            work()
            while time.monotonic() < end:
                pass
            arrived["nothing"] += 1
        except BaseException as error:
            arrived[repr(error)[:200]] += 1
    signal.signal(signal.SIGALRM, before)
    return arrived


rng, rounds = random.Random(sys.argv[2]), int(sys.argv[3])
for kind in (Interrupt, Deadline):
    for work in (of_ops, of_modules):
        arrived = raised_by(kind, work, rounds, rng)
        assert [*arrived] == [repr(kind("of the handler"))], (kind, work, arrived)
        work()
        y[...] = np.nan
        prepared()
        assert (abs(y - 1) < 1e-2).all()
print("ended")
