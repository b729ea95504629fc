"""Prepared runs after their plans were made again, or could not be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.ops.attention.schedule import Planner

from tests.attention.batches import SPARE
from tests.attention.cases import Case, refused
from tests.attention.prepared import (
    EVERY_FAMILY,
    MACHINES,
    ROOM,
    SERVICES,
    Runs,
    on_each,
    run_of,
)
from tests.attention.tables import SERVED
from tests.helpers.prepared_calls import same_error


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    yield from on_each(request.param, monkeypatch)


# Those whose workspace has no room to spare.
_TIGHT = {name: spec for name, spec in SERVED.items() if name.startswith(("prefill", "decode"))}
GROWING = pytest.mark.parametrize("spec", _TIGHT.values(), ids=_TIGHT)


@SERVICES
@pytest.mark.parametrize("more", [{}, {"enable_cuda_graph": True}], ids=["plain", "graph"])
def test_runs_after_replans(spec, more, machine, rng):
    """A prepared run is of the plan as it is, whatever was planned in between."""
    made = Runs(spec, machine, rng, **more)
    call = made.prepare()
    call()
    for _ in range(6):
        batch = made.service.batch()
        rows = made.case.rows if more else batch.rows
        made.case.replan(made.plan, batch)
        made.clear()
        if rows != made.rows:
            # As the run itself: queries of another number than were planned.
            with pytest.raises(fi_ffi.ArgumentError, match="as planned") as caught:
                call()
            with pytest.raises(fi_ffi.ArgumentError) as in_full:
                made.run(**made.case.run_options(batch))
            assert same_error(caught.value, in_full.value)
            made.rows, made.out, made.batch = rows, made.case.outputs(rows), batch
            call = made.prepare()
        made.batch = batch
        made.check(call, call)


@EVERY_FAMILY
def test_runs_are_given_what_the_last_plan_returned(spec, machine, rng):
    """A frame that a run has left is the next one's, with the info of the plan made since."""
    made = Runs(spec, machine, rng)
    for _ in range(3):
        made.run()
        made.replan()
        call = made.prepare()
        frame = call.take()
        info = int(ffi.cast("uintptr_t", made.plan._info.handle))
        assert info in frame.addresses.tolist()
        call.give(frame)


class Growing:
    """A plan with a workspace of its own, and a batch that it has no room for yet: one of so
    many pages that their indices take more."""

    def __init__(self, spec, machine, rng):
        spec, keys = replace(spec, page_size=1), 3000
        self.machine = machine
        self.case = Case(spec, machine, rng, spec.batch, SPARE + spec.batch * keys + 2)
        ones = [1] * spec.batch
        self.few, self.many = (self.case.batch(ones, [n] * spec.batch) for n in (3, keys))
        self.plan = self.case.plan(self.few)
        self.out = self.case.outputs(spec.batch)
        self.tensors = [*self.case.inputs(spec.batch), self.out.o.desc(), self.out.lse.desc()]
        self.more = self.case.run_options(self.few) | {"stream": machine.stream}
        self.call = fi_ffi.prepare(run_of(self.plan), *self.tensors, **self.more)

    def run(self):
        run_of(self.plan)(*self.tensors, **self.more)

    def check(self, batch):
        """Both ways of a run give this batch's results."""
        for go in (self.call, self.run, self.call):
            for placed in (self.out.o, self.out.lse):
                self.machine.poison(placed, self.machine.stream)
            go()
            self.case.check(batch, self.out)


@GROWING
def test_a_plans_own_workspace_grows_under_a_prepared_run(spec, machine, rng):
    """The plan then has another workspace, of the same number of plans as the first had."""
    made = Growing(spec, machine, rng)
    made.check(made.few)
    before = made.plan.workspace
    made.case.replan(made.plan, made.many)
    assert made.plan.workspace.int_bytes > before.int_bytes
    made.check(made.many)
    made.case.replan(made.plan, made.few)
    made.check(made.few)


@GROWING
def test_a_replan_that_fails_after_the_workspace_grew(spec, machine, rng, monkeypatch):
    """Then there is no plan, neither for prepared runs nor for others, until there is one."""
    made = Growing(spec, machine, rng)
    made.check(made.few)
    before = made.plan.workspace

    def fail(*_):
        raise RuntimeError("the planner failed")

    with monkeypatch.context() as patch:
        patch.setattr(Planner, "plan", fail)
        with pytest.raises(RuntimeError, match="the planner"):
            made.case.replan(made.plan, made.many)
    assert made.plan.workspace is not before
    for go in (made.run, made.call, made.run):
        with pytest.raises(fi_ffi.ArgumentError, match="stale"):
            go()
    made.case.replan(made.plan, made.few)
    made.check(made.few)
    made.case.replan(made.plan, made.many)
    made.check(made.many)


@GROWING
@pytest.mark.parametrize("whose", ["the caller's", "its own"])
def test_a_replan_without_room_leaves_what_it_was(whose, spec, machine, rng, monkeypatch):
    """The batch before, its sizes and its workspace, for runs of either kind."""
    made = Growing(spec, machine, rng)
    if whose == "the caller's":
        room = made.case.plan(made.few).size
        workspace = fi_ffi.Workspace.allocate(machine.device, *room)
        made.plan = made.case.plan(made.few, workspace=workspace)
        made.call = fi_ffi.prepare(run_of(made.plan), *made.tensors, **made.more)
    plan = made.plan
    before = plan.size, plan.workspace, plan.plan_info, repr(plan)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fi_ffi.Workspace, "allocate", fail)
        words = "as workspace_size tells|which could not be allocated"
        for _ in range(2):
            with pytest.raises(fi_ffi.ArgumentError, match=words):
                made.case.replan(plan, made.many)
            assert (plan.size, plan.workspace, plan.plan_info, repr(plan)) == before
    made.check(made.few)
    if whose == "its own":
        made.case.replan(plan, made.many)
        made.check(made.many)


@EVERY_FAMILY
def test_updates_hold_through_replans(spec, machine, rng):
    made = Runs(spec, machine, rng)
    call = made.prepare()
    other = made.case.outputs(made.rows)
    tensors = made.tensors(other)
    for by in (lambda d: d, lambda d: d.ptr):
        call.update(o=by(tensors["o"]), lse=by(tensors["lse"]))
        for _ in range(2):
            made.replan()
            made.clear()
            made.check(call, out=other)
            assert np.isnan(made.out.o.get().astype(float)).all()
        back = made.tensors()
        call.update(o=by(back["o"]))
        call.update(lse=by(back["lse"]))
        made.replan()
        made.check(call)


@SERVICES
def test_two_plans_of_one_workspace(spec, machine, rng):
    """The one that does not hold it is stale, prepared or not, until it is planned again."""
    workspace = fi_ffi.Workspace.allocate(machine.device, *ROOM[machine.is_gpu])
    plans = [Runs(spec, machine, rng, workspace=workspace)]
    calls = [plans[0].prepare()]
    plans[0].check(calls[0], plans[0].run)
    plans.append(Runs(spec, machine, rng, workspace=workspace))
    calls.append(plans[1].prepare())
    for holder in (1, 0, 1):
        other = plans[1 - holder]
        plans[holder].replan()
        other.clear()
        for use in (calls[1 - holder], other.run) * 2:
            with pytest.raises(fi_ffi.ArgumentError, match="a stale plan") as caught:
                use()
            assert caught.value.op == other.plan.op
        for use in (other.prepare, lambda: other.plan.plan_info):  # noqa: B023
            with pytest.raises(fi_ffi.ArgumentError, match="a stale plan"):
                use()
        plans[holder].check(calls[holder], plans[holder].run)
        assert np.isnan(other.out.o.get().astype(float)).all()


@EVERY_FAMILY
def test_a_replan_that_fails_leaves_what_it_was(spec, machine, rng):
    """Runs of the batch before go on as they would in full: prepared, repeated or neither."""
    made = Runs(spec, machine, rng)
    call = made.prepare()
    made.run()
    args, arrays = made.case.arguments(made.batch)
    with pytest.raises(fi_ffi.ArgumentError):
        made.plan.replan(np.zeros(1), *args[1:], **arrays)
    made.check(call, made.run)


@SERVICES
def test_room_of_prepared_runs(spec, machine, rng):
    """With CUDA graphs a replan is refused that needs more than a prepared run was given."""
    told = []
    for prepared in (False, True):
        made = Runs(spec, machine, rng, enable_cuda_graph=True)
        (made.prepare if prepared else made.run)()
        room = dict(made.plan._captured.room)
        assert room == {"pages": made.case.room}
        wrong = refused(made.service, made.batch)
        for batch in wrong:
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                made.case.replan(made.plan, batch)
            told.append((prepared, caught.value.op, caught.value.argument))
    half = len(told) // 2
    assert [t[1:] for t in told[:half]] == [t[1:] for t in told[half:]]


@EVERY_FAMILY
def test_graph_plans_with_prepared_runs(spec, machine, rng):
    """One prepared run, captured (on the CPU: repeated), serves other lengths after replans."""
    made = Runs(spec, machine, rng, enable_cuda_graph=True)
    call = made.prepare()
    made.check(call)
    replay = machine.capture(call)
    for _ in range(4):
        made.batch = made.service.batch()
        made.replan()
        made.check(replay)
