"""Prepared and repeated runs over time: owners, caches, kernels that change, threads."""

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
from tests.attention.prepared import MACHINES, Runs, on_each, run_of, same
from tests.attention.tables import SERVED


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    yield from on_each(request.param, monkeypatch)


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
        made.case.replan(made.plan, made.batch)
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
    made.case.replan(made.plan, made.batch)
    call()
    gc.collect()
    assert refs[0]() is not None and np.isfinite(refs[0]().astype(float)).all()
    call.update(o=second)
    del second
    gc.collect()
    assert refs[0]() is None and refs[1]() is not None
    made.case.replan(made.plan, made.batch)
    call()
    gc.collect()
    assert np.isfinite(refs[1]().astype(float)).all()
    call.update(o=made.tensors()["o"].ptr)
    gc.collect()
    assert refs[1]() is None
    call()
    made.case.check(made.batch, made.out)


def test_options_of_one_run_are_not_those_of_the_next(rng):
    made = Runs(SERVED["decode"], Cpu(), rng)
    for i in range(100):
        made.plan.run(**made.tensors(), sm_scale=1.0 + i)
    made.plan.run(**made.tensors())
    made.case.check(made.batch, made.out)


def test_dtypes_and_devices_that_are_named_anew(machine, rng):
    made = Runs(SERVED["prefill fa2"], machine, rng)
    call = made.prepare()
    options = made.case.run_options(made.batch)
    expected = made.full()
    for _ in range(3):
        tensor._NAMED.clear()
        made.clear()
        run_of(made.plan)(**made.tensors(), stream=machine.stream, **options)
        assert same(made.out, expected)
        made.clear()
        call.update(**made.tensors())
        call()
        assert same(made.out, expected)
        made.case.replan(made.plan, made.batch)


def test_kernels_that_change_under_a_plan(rng):
    """A plan and its prepared runs stay with the kernels that it was planned by."""
    made = Runs(SERVED["decode"], Cpu(), rng)
    call = made.prepare()
    attention.forget()
    for go in (call, lambda: made.plan.run(**made.tensors())):
        made.clear()
        go()
        made.case.check(made.batch, made.out)
    made.case.replan(made.plan, made.batch)
    call()
    made.case.check(made.batch, made.out)


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
            run_of(made.plan)(**made.tensors(), **made.case.run_options(made.batch))
            run_of(made.plan)(**made.tensors(), **made.case.run_options(made.batch))
            made.case.replan(made.plan, made.batch)
            call()
    launched = [name for name in seen if "plan" not in name]
    assert len(launched) == 4 and len(seen) == 5, seen
    made.case.check(made.batch, made.out)


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
        made.case.check(made.batch, made.out)
    assert not failed


def test_a_plan_is_prepared_by_a_method_that_runs_it(rng):
    case, batch = make(SERVED["decode"], Cpu(), rng)
    plan = case.plan(batch)
    for wrong in (plan.replan, plan, type(plan), type(plan).run, plan.check_current):
        with pytest.raises(fi_ffi.ArgumentTypeError, match="a run of a plan"):
            fi_ffi.prepare(wrong, 1, 2, 3)
    with pytest.raises(TypeError, match="temperature"):
        fi_ffi.prepare(plan.run, 1, 2, 3, 4, temperature=1)
