"""Plans' prepared runs on a GPU: the tests of tests/attention, and runs on other streams."""

from __future__ import annotations

import fi_ffi

from tests.attention import test_prepared_replans as of_replans
from tests.attention import test_prepared_runs as of_runs
from tests.attention.prepared import SERVICES, Runs

test_the_same_bits = of_runs.test_the_same_bits
test_runs_that_are_repeated = of_runs.test_runs_that_are_repeated
test_updates_that_fail_change_nothing = of_runs.test_updates_that_fail_change_nothing
test_runs_after_replans = of_replans.test_runs_after_replans
test_a_plans_own_workspace_grows = of_replans.test_a_plans_own_workspace_grows_under_a_prepared_run
test_updates_hold_through_replans = of_replans.test_updates_hold_through_replans
test_two_plans_of_one_workspace = of_replans.test_two_plans_of_one_workspace
test_graph_plans_with_prepared_runs = of_replans.test_graph_plans_with_prepared_runs


@SERVICES
def test_prepared_runs_on_other_streams(spec, machine, rng):
    """Each waits for its plan, and the next plan for all of them: nothing is waited for here."""
    made = Runs(spec, machine, rng)
    streams = [machine.stream, *machine.streams(3)]
    outs = [made.case.outputs(made.rows) for _ in streams]
    calls = [made.prepare(out, stream=stream) for out, stream in zip(outs, streams, strict=True)]
    loose = made.prepare(outs[-1], stream=None)
    for call in calls:  # loaded, and the buffers placed
        call()
    machine.synchronize()
    for _ in range(machine.rounds(20)):
        for out in outs:
            made.clear(out)
        machine.synchronize()
        machine.delay(machine.stream)
        made.case.replan(made.plan, made.batch)
        for call in calls[:-1]:
            call()
        with fi_ffi.stream(streams[-1]):
            loose()
        # Written over while those may still be to run, if they were not waited for.
        made.case.replan(made.plan, made.batch)
        machine.synchronize()
        for out in outs:
            made.case.check(made.batch, out)
