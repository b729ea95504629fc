"""Streams of prepared runs, and what waits for what, on a pretended GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.attention.prepared import SERVICES, Runs, on_each, run_of
from tests.attention.tables import SERVED


@pytest.fixture
def gpu(monkeypatch):
    yield from on_each("pretended gpu", monkeypatch)


@SERVICES
def test_streams(spec, gpu, rng):
    """The stream that it was prepared for; the scope's; and none is told of."""
    made = Runs(spec, gpu, rng)
    call = made.prepare()
    gpu.seen.clear()
    call()
    assert {*gpu.seen} == {gpu.stream}
    gpu.seen.clear()
    with fi_ffi.stream(0x99):
        call()
    assert {*gpu.seen} == {gpu.stream}
    loose = made.prepare(stream=None)
    with pytest.raises(fi_ffi.ArgumentError, match="`stream`") as caught:
        loose()
    assert caught.value.op == made.plan.op
    for handle in (gpu.stream, 0x99, 0):
        gpu.seen.clear()
        with fi_ffi.stream(handle):
            loose()
            loose()
        assert {*gpu.seen} == {handle}
    with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
        loose()
    with pytest.raises(fi_ffi.ArgumentTypeError, match="`stream`"):
        made.prepare(stream="default")
    made.case.check(made.batch, made.out)


@SERVICES
@pytest.mark.parametrize("how", ["run", "prepared", "scoped"])
def test_runs_on_other_streams_wait(spec, how, gpu, rng):
    """Such a run waits for its plan once, and the next plan waits for all of them."""
    made = Runs(spec, gpu, rng)
    other, third = gpu.streams(2)
    options = made.case.run_options(made.batch)
    call = made.prepare(stream=None if how == "scoped" else other)

    def go(stream):
        if how == "prepared" and stream == other:
            call()
        elif how == "scoped":
            with fi_ffi.stream(stream):
                call()
        else:
            run_of(made.plan)(**made.tensors(), stream=stream, **options)

    log = gpu.runtime.log
    log.clear()
    go(gpu.stream)
    assert not log, "on the plan's own stream there is nothing to wait for"
    for _ in range(3):
        go(other)
    assert [entry[0] for entry in log] == ["wait", "record", "record", "record"]
    assert {entry[2] for entry in log} == {other}
    (event,) = {entry[1] for entry in log if entry[0] == "record"}
    go(third)
    log.clear()
    made.case.replan(made.plan, made.batch)
    waits = [entry for entry in log if entry[0] == "wait"]
    assert ("wait", event, gpu.stream) in waits and len(waits) == 2
    assert log.index(waits[-1]) < log.index(("copy", gpu.stream))
    gpu.runtime.capturing = {other}
    log.clear()
    go(other)
    assert not log, "who replays a graph orders it"
    made.case.check(made.batch, made.out)


def test_a_stream_of_the_same_number(gpu, rng):
    """Other types for the plan's own stream: what they name is launched on."""
    made = Runs(SERVED["decode"], gpu, rng)

    class Stream:
        def __init__(self, handle):
            self.handle = handle

        def __cuda_stream__(self):
            return (0, self.handle)

    made.plan.run(**made.tensors(), stream=gpu.stream)
    for stream in (np.int64(gpu.stream), Stream(gpu.stream), Stream(0x99), np.uint64(0x99)):
        gpu.seen.clear()
        made.plan.run(**made.tensors(), stream=stream)
        handle = stream.handle if isinstance(stream, Stream) else int(stream)
        assert {*gpu.seen} == {handle}
    for wrong in (True, float(gpu.stream), str(gpu.stream), -1, 2**64):
        with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
            made.plan.run(**made.tensors(), stream=wrong)
