"""Prepared and repeated runs over time: owners, caches, kernels that change, threads, streams."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import tensor
from fi_ffi.ops import attention
from fi_ffi.ops.watch import watching

from tests.attention.arrays import bytes_of
from tests.attention.bodies import make
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
    """What a prepared run is of is kept alive, also by address of nobody, and then let go."""
    made = Runs(SERVED["decode"], Cpu(), rng)

    class Watched(np.ndarray):
        pass

    def fresh():
        return made.out.o.get().view(Watched)

    first, second = fresh(), fresh()
    refs = [weakref.ref(first), weakref.ref(second)]
    call = fi_ffi.prepare(run_of(made.plan), **made.tensors() | {"o": first})
    del first
    gc.collect()
    assert refs[0]() is not None
    made.replan()
    call()
    gc.collect()
    assert refs[0]() is not None and np.isfinite(refs[0]().astype(float)).all()
    call.update(o=second)
    del second
    gc.collect()
    assert refs[0]() is None and refs[1]() is not None
    made.replan()
    call()
    gc.collect()
    assert np.isfinite(refs[1]().astype(float)).all()
    call.update(o=made.tensors()["o"].ptr)
    gc.collect()
    assert refs[1]() is None
    call()
    made.check()


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
    attention.forget()
    made.check(call, made.run)
    made.replan()
    made.check(call)


def test_a_watchdog_sees_prepared_runs(rng):
    made = Runs(SERVED["prefill fa2"], Cpu(), rng)
    call, seen = made.prepare(), []
    real = watching.watched

    def watched(frame, *args):
        seen.append(frame.variant.compiled.row.name)
        return real(frame, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "watched", watched)
        with fi_ffi.watchdog(30):
            call()
            made.run()
            made.run()
            made.replan()
            call()
    launched = [name for name in seen if "plan" not in name]
    assert len(launched) == 4 and len(seen) == 5, seen
    made.check()


def test_threads_use_a_prepared_run_in_turns(rng):
    made = Runs(SERVED["decode"], Cpu(), rng)
    call, failed = made.prepare(), []
    held = call.take()
    with pytest.raises(fi_ffi.ArgumentError, match="BatchDecodePlan.*in use"):
        call()
    with pytest.raises(fi_ffi.ArgumentError, match="BatchDecodePlan.*in use"):
        call.update(o=made.tensors()["o"])
    call.give(held)

    def work():
        try:
            call()
        except BaseException as error:
            failed.append(error)

    for _ in range(4):
        made.clear()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        made.check()
    assert not failed


def test_a_plan_is_prepared_by_a_method_that_runs_it(rng):
    case, batch = make(SERVED["decode"], Cpu(), rng)
    plan = case.plan(batch)
    for wrong in (plan.replan, plan, type(plan), type(plan).run, plan.check_current):
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
