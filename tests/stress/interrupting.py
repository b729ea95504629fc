"""What test_signals.py interrupts as often as it tells it to go on; after each everything works."""

from __future__ import annotations

import signal
import sys

import numpy as np

import fi_ffi

from tests.helpers.plan_calls import KINDS, Case

signal.signal(signal.SIGINT, signal.default_int_handler)
module = fi_ffi.module(sys.argv[1])
scale = module.entry("scale")
numbers = np.ones(1 << 14, np.float32)
x, w = np.ones((4, 64), np.float16), np.ones(64, np.float16)
y = np.empty_like(x)
descs = [fi_ffi.as_desc(array) for array in (y, x, w)]
call = fi_ffi.rmsnorm.prepare(*descs, eps=0.0)
cases = [Case(kind) for kind in KINDS]
plans = [case.plan() for case in cases]


def many_calls():
    while True:
        for _ in range(50):
            scale(numbers, 1.0)
        fi_ffi.rmsnorm(*descs)
        call()


def many_plans():
    while True:
        for case, plan in zip(cases, plans, strict=True):
            case.replan(plan)
            case.run(plan)
            case.plan()
            case.replan(plan)


def in_blocks():
    while True:
        with fi_ffi.stream(0x51), fi_ffi.watchdog(60):
            fi_ffi.rmsnorm(*descs)


def works():
    assert (numbers == 1).all()
    for made in (lambda: fi_ffi.rmsnorm(*descs, eps=0.0), call):
        y[...] = np.nan
        made()
        assert (y == 1).all()
    for case, plan in zip(cases, plans, strict=True):
        case.memory["o"][...] = np.nan
        case.replan(plan)
        case.run(plan)
        case.check()


work = {"calls": many_calls, "plans": many_plans, "blocks": in_blocks}[sys.argv[2]]
while True:
    told = ""
    try:
        print("go", flush=True)
        work()
    except KeyboardInterrupt:
        told = "interrupted"
    except RuntimeError as error:  # threading.Event's own, between two of its lines
        told = "interrupted" if str(error) == "release unlocked lock" else repr(error)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from fi_ffi.abi.streams import current_scope

    if sys.argv[2] != "blocks":
        assert current_scope() is None
    works()
    print(told, flush=True)
    again = sys.stdin.readline()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not again:
        raise KeyboardInterrupt
