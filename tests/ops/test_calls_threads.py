"""Threads with streams of their own, on a pretended GPU; many threads that call one op."""

from __future__ import annotations

import threading

import numpy as np

import fi_ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.ops.watch import watching

from tests.attention.pretend import current_stream
from tests.helpers.prepared_calls import Calls


def test_scopes_are_each_threads_own(gpu, mine):
    """A scope open on one thread is none on another, where prepared calls need their own."""
    calls, told = Calls(mine), []

    def work():
        try:
            calls.call()
        except fi_ffi.ArgumentError as error:
            told.append(error.argument)
        with fi_ffi.stream(0x61):
            calls.call()
            told.append(current_stream())
        told.append(current_stream())

    with fi_ffi.stream(0x51):
        calls.call()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert told == ["stream", 0x61, 0]
        gpu.seen.clear()
        calls.call()
        assert {*gpu.seen} == {0x51}


def test_many_threads_with_streams_of_their_own(gpu, mine):
    """Typed and prepared calls of one op from many threads: each on its own thread's stream."""
    threads, rounds = 6, 100
    wrong, barrier = [], threading.Barrier(threads)
    found = threading.local()
    mine.work = lambda: setattr(found, "stream", current_stream())

    def work(handle):
        x = np.full((4, 16), handle, np.float16)
        y = np.full_like(x, np.nan)
        descs = [
            fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", device="cuda:0") for a in (y, x)
        ]
        call = mine.op.prepare(*descs, factor=2.0)
        barrier.wait(60)
        for i in range(rounds):
            try:
                if i % 3 == 0:
                    mine.op(*descs, factor=2.0, stream=handle)
                elif i % 3 == 1:
                    with fi_ffi.stream(handle):
                        call()
                else:
                    with fi_ffi.stream(handle):
                        mine.op(*descs, factor=2.0)
            except BaseException as error:
                wrong.append(repr(error))
                return
            if found.stream != handle or not (y == 2 * x).all() or current_stream():
                wrong.append((handle, i, found.stream))
            y[...] = np.nan

    made = [threading.Thread(target=work, args=(0x100 + i,)) for i in range(threads)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    assert not wrong, wrong[:3]


def test_many_threads_call_one_op(mine):
    """Each with memory of its own; none gets another's frame while it is in use."""
    threads, rounds = 8, 200
    barrier, wrong = threading.Barrier(threads), []

    def work(number):
        rng = np.random.default_rng()
        x = rng.standard_normal((4, 16)).astype(np.float16)
        w = rng.standard_normal(16).astype(np.float16)
        y = np.full_like(x, np.nan)
        descs = [as_desc(array) for array in (y, x, w)]
        barrier.wait(60)
        for i in range(rounds):
            factor, with_w = float(number * rounds + i) / 64, i % 3 == 0
            try:
                mine.op(*descs[: 2 + with_w], factor=factor)
            except BaseException as error:
                wrong.append(repr(error))
                return
            expected = x * np.float16(factor) + (w if with_w else 0)
            if not (y == expected).all():
                wrong.append((number, i))
            y[...] = np.nan

    made = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    assert not wrong, wrong[:5]
    for variant in mine.op.compiled.variants.values():
        assert 1 <= len(variant.frames) <= threads
        assert len({id(frame) for frame in variant.frames}) == len(variant.frames)


def test_a_watchdog_sees_calls(mine):
    mine.op(*mine.descs)
    mine.op(*mine.descs)
    seen, leave, reports = [], threading.Event(), []
    mine.work = lambda: seen.append(len(watching.hooks))
    with fi_ffi.watchdog(30):
        for _ in range(3):
            mine.op(*mine.descs, factor=2.0)
            assert mine.is_done(2)
    assert seen == [1, 1, 1]

    def tell(text):
        reports.append(text)
        leave.set()

    mine.work = lambda: leave.wait(30)
    with fi_ffi.watchdog(0.2, on_hang=tell):
        mine.op(*mine.descs, factor=2.75)
    assert len(reports) == 1 and "2.75" in reports[0]
    mine.work = lambda: None
    mine.op(*mine.descs, factor=3.0)
    assert mine.is_done(3)
