"""Prepared and repeated runs over time: owners, caches, kernels that change, threads, streams."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import tensor
from fi_ffi.loader import generation

from tests.attention.batches import bytes_of
from tests.attention.cases import make
from tests.attention.machines import Cpu
from tests.attention.prepared import MACHINES, SERVICES, Runs, on_each, run_of, same
from tests.attention.tables import SERVED


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    yield from on_each(request.param, monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    yield from on_each("pretended gpu", monkeypatch)


def test_without_lse(machine, rng):
    made = Runs(SERVED["decode"], machine, rng)
    tensors = made.tensors()
    lse = tensors.pop("lse")
    call = fi_ffi.prepare(run_of(made.plan), **tensors, stream=machine.stream,
                          **made.case.run_options(made.batch))  # fmt: skip
    for _ in range(2):
        with pytest.raises(fi_ffi.ArgumentError, match="`lse`.*None, as it was prepared"):
            call.update(lse=lse)
        with pytest.raises(fi_ffi.ArgumentError, match="`lse`.*None, as it was prepared"):
            call.update(lse=lse.ptr)
        call.update(lse=None)
        call()
        made.replan()
        call()
    assert np.isnan(made.out.lse.get()).all()
    assert bytes_of(made.out.o.get()) == bytes_of(made.full().o.get())


def test_owners(rng):
    """What a prepared run is of is kept alive, also through replans, and then let go."""
    made = Runs(SERVED["decode"], Cpu(), rng)

    class Watched(np.ndarray):
        pass

    tensors = [made.out.o.get().view(Watched) for _ in range(2)]
    refs = [weakref.ref(tensor) for tensor in tensors]

    def alive():
        gc.collect()
        return [ref() is not None for ref in refs]

    call = fi_ffi.prepare(run_of(made.plan), **made.tensors() | {"o": tensors.pop(0)})
    made.replan()
    call()
    assert alive() == [True, True] and np.isfinite(refs[0]().astype(float)).all()
    call.update(o=tensors.pop())
    assert alive() == [False, True]
    made.replan()
    call()
    assert alive() == [False, True] and np.isfinite(refs[1]().astype(float)).all()
    call.update(o=made.tensors()["o"].ptr)
    assert alive() == [False, False]
    made.check(call)


def test_options_of_one_run_are_not_those_of_the_next(rng):
    made = Runs(SERVED["decode"], Cpu(), rng)
    for i in range(100):
        made.run(sm_scale=1.0 + i)
    made.check(made.run)


def test_dtypes_and_devices_that_are_named_anew(machine, rng):
    made = Runs(SERVED["prefill fa2"], machine, rng)
    call = made.prepare()
    expected = made.full()
    for _ in range(3):
        tensor._NAMED.clear()
        made.clear()
        made.run()
        assert same(made.out, expected)
        made.clear()
        call.update(**made.tensors())
        call()
        assert same(made.out, expected)
        made.replan()


def test_kernels_that_change_under_a_plan(rng):
    """A plan and its prepared runs stay with the kernels that it was planned by."""
    made = Runs(SERVED["decode"], Cpu(), rng)
    call = made.prepare()
    generation.advance()
    made.check(call, made.run)
    made.replan()
    made.check(call)


def test_one_thread_at_a_time_uses_a_prepared_run(rng):
    made = Runs(SERVED["decode"], Cpu(), rng)
    call = made.prepare()
    held = call.take()
    for use in (call, lambda: call.update(o=made.tensors()["o"])):
        with pytest.raises(fi_ffi.ArgumentError, match="BatchDecodePlan.*in use"):
            use()
    call.give(held)
    made.check(call)


def test_a_plan_is_prepared_by_a_method_that_runs_it(rng):
    case, batch = make(SERVED["decode"], Cpu(), rng)
    plan = case.plan(batch)
    for wrong in (plan.replan, plan, type(plan), type(plan).run, plan._check_current):
        with pytest.raises(fi_ffi.ArgumentTypeError, match="a run of a plan"):
            fi_ffi.prepare(wrong, 1, 2, 3)
    with pytest.raises(TypeError, match="temperature"):
        fi_ffi.prepare(plan.run, 1, 2, 3, 4, temperature=1)


# What waits for what, on a pretended GPU.


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
    made.check()


@SERVICES
@pytest.mark.parametrize("how", ["run", "prepared", "scoped"])
def test_runs_on_other_streams_wait(spec, how, gpu, rng):
    """Such a run waits for its plan once, and the next plan waits for all of them."""
    made = Runs(spec, gpu, rng)
    other, third = gpu.streams(2)
    call = made.prepare(stream=None if how == "scoped" else other)

    def go(stream):
        if how == "prepared" and stream == other:
            call()
        elif how == "scoped":
            with fi_ffi.stream(stream):
                call()
        else:
            made.run(stream=stream)

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
    made.replan()
    waits = [entry for entry in log if entry[0] == "wait"]
    assert ("wait", event, gpu.stream) in waits and len(waits) == 2
    assert log.index(waits[-1]) < log.index(("copy", gpu.stream))
    gpu.runtime.capturing = {other}
    log.clear()
    go(other)
    assert not log, "who replays a graph orders it"
    made.check()


def test_a_stream_of_the_same_number(gpu, rng):
    """Other types for the plan's own stream: what they name is launched on."""
    made = Runs(SERVED["decode"], gpu, rng)
    for stream in (gpu.stream, np.int64(gpu.stream), np.uint64(0x99)):
        gpu.seen.clear()
        made.plan.run(**made.tensors(), stream=stream)
        assert {*gpu.seen} == {int(stream)}
    for wrong in (True, float(gpu.stream), str(gpu.stream), -1, 2**64):
        with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
            made.plan.run(**made.tensors(), stream=wrong)
