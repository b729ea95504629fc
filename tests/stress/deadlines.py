"""Calls that the exception of a timer's signal meets anywhere; each one has to arrive as itself."""

from __future__ import annotations

import random
import sys

import numpy as np

import fi_ffi

from tests.helpers.deadlines import check_arrival

x, w, y = np.ones((4, 64), np.float16), np.ones(64, np.float16), np.empty((4, 64), np.float16)


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


rng, rounds = random.Random(sys.argv[2]), int(sys.argv[3])
for work in (of_ops, of_modules):
    check_arrival(work, rounds, rng)
    work()
    y[...] = np.nan
    prepared()
    assert (abs(y - 1) < 1e-2).all()
print("ended")
