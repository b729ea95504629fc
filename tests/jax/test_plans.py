"""Plans inside jax.jit: made outside, planned again between calls, against float64."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest

import fi_ffi.jax
from fi_ffi.jax.plans import is_recordable

from tests.attention.cases import Service, graph_options, make
from tests.attention.machines import Cpu
from tests.attention.tables import SERVED
from tests.helpers.in_jit import check_in_jit, check_lengths_as_arrays, given, in_jit

# What jax raises for a call that fails: at once, or where its result is waited for.
FAILURES = (ValueError, jax.errors.JaxRuntimeError)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_planned_again_between_calls(spec, graph, rng):
    """One compiled program, for requests of other lengths each time, in other memory."""
    service = Service(spec, Cpu(), rng)
    batch = service.batch()
    plan = service.case.plan(batch, **graph_options(service) if graph else {})
    assert is_recordable(plan) is graph
    run, rows = in_jit(plan, service.case, batch), service.rows if graph else None
    for _ in range(3):
        check_in_jit(run, service.case, batch, rows)
        batch = service.batch()
        service.case.replan(plan, batch)
    if graph:
        assert run._cache_size() == 1


def test_lengths_that_are_arrays(rng):
    assert is_recordable(check_lengths_as_arrays(Service(SERVED["decode"], Cpu(), rng), runs=2))


def test_keys_that_lie_one_after_the_other(rng):
    spec = replace(SERVED["prefill fa2"], page_size=0)
    case, batch = make(spec, Cpu(), rng)
    check_in_jit(in_jit(case.plan(batch), case, batch), case, batch)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_scalars_of_a_run(kind, rng):
    """Numbers of numpy are compiled in as Python's are; a traced one is refused in the trace."""
    service = Service(SERVED["decode"], Cpu(), rng)
    case, batch = service.case, service.batch()
    plan, tensors = case.plan(batch), given(case, batch)
    out = np.full_like(tensors[0], np.nan)
    plan.run(*tensors, out, sm_scale=0.0625)
    found = fi_ffi.jax.run(plan, *tensors, sm_scale=kind(0.0625))
    assert np.asarray(found).tobytes() == out.tobytes()
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"`sm_scale`.*static_argnames"):
        jax.jit(lambda scale: fi_ffi.jax.run(plan, *tensors, sm_scale=scale))(kind(0.0625))


def test_a_plan_that_is_gone(rng):
    service = Service(SERVED["decode"], Cpu(), rng)
    case, batch = service.case, service.batch()
    kept = [case.plan(batch)]
    run = jax.jit(lambda *tensors: fi_ffi.jax.run(kept[0], *tensors))
    compiled = run.lower(*given(case, batch)).compile()
    jax.block_until_ready(compiled(*given(case, batch)))
    kept.clear()
    gc.collect()
    with pytest.raises(FAILURES, match="`plan`: got a plan that is gone"):
        jax.block_until_ready(compiled(*given(case, batch)))


def test_a_plan_that_may_be_recorded_lives_as_long_as_its_program(rng):
    """XLA replays it without asking: it has the plan's memory for so long, and no longer."""
    service = Service(SERVED["decode"], Cpu(), rng)
    batch = service.batch()
    kept = [service.case.plan(batch, **graph_options(service))]
    alive, workspace = weakref.ref(kept[0]), kept[0].workspace
    run, tensors = (
        jax.jit(lambda *tensors: fi_ffi.jax.run(kept[0], *tensors)),
        given(service.case, batch),
    )
    before = np.asarray(run(*tensors))
    with pytest.raises(fi_ffi.ArgumentError, match="`workspace`: got one whose plan runs in a com"):
        service.case.plan(batch, workspace=workspace, **graph_options(service))
    kept.clear()
    for _ in range(3):
        gc.collect()
        assert np.asarray(run(*tensors)).tobytes() == before.tobytes()
    assert alive() is not None
    del run
    jax.clear_caches()
    gc.collect()
    assert alive() is None
    service.case.plan(batch, workspace=workspace, **graph_options(service))


def test_two_runs_of_a_plan_come_one_after_the_other(rng):
    """Both have the plan's workspace: XLA is told that the second needs the first."""
    service = Service(SERVED["decode"], Cpu(), rng)
    batch = service.batch()
    plan, other = (service.case.plan(batch) for _ in range(2))
    q, k, v = given(service.case, batch)
    runs = jax.jit(
        lambda q, k, v: [
            fi_ffi.jax.run(one, q * n, k, v) for n, one in ((1, plan), (2, other), (3, plan))
        ]
    )
    found = runs(q, k, v)
    for n, got in zip((1, 2, 3), found, strict=True):
        out = np.full_like(q, np.nan)
        plan.run(q * np.float16(n), k, v, out)
        assert np.asarray(got).tobytes() == out.tobytes()
    text = runs.lower(q, k, v).as_text()
    calls = re.findall(r"(%\d+) = stablehlo.custom_call @fi_ffi\w*\.call\((.*?)\)", text)
    assert [len(operands.split(", ")) for _, operands in calls] == [3, 3, 4]
    assert calls[2][1].split(", ")[-1] == calls[0][0]


WRONG = {
    "vmap": (lambda run, q, k, v: jax.vmap(run, (0, None, None))(q[None], k, v), r"`q`: got an ar"),
    "grad": (lambda run, q, k, v: jax.jvp(lambda q: run(q, k, v), (q,), (q,)), r"`q`.*custom_vjp"),
    "an option": (lambda run, q, k, v: run(q, k, v, sm_scales=1.0), "`options`: got sm_scales, ex"),
    "complex": (
        lambda run, q, k, v: run(q.astype(np.complex64), k, v),
        r"`q`: got complex64\[6, 4",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused_in_a_trace(what, rng):
    """In the words of the plan's class and run."""
    call, words = WRONG[what]
    service = Service(SERVED["decode"], Cpu(), rng)
    batch = service.batch()
    run = functools.partial(fi_ffi.jax.run, service.case.plan(batch))
    with pytest.raises(fi_ffi.ArgumentError, match=f"^BatchDecodePlan.run: argument {words}"):
        call(run, *given(service.case, batch))


def test_an_option_of_a_prefill(rng):
    service = Service(SERVED["prefill fa2"], Cpu(), rng)
    batch = service.batch()
    plan = service.case.plan(batch)
    tensors = given(service.case, batch)
    with pytest.raises(
        fi_ffi.ArgumentTypeError, match="paged_run: .*`options`: got sm_scales, exp"
    ):
        fi_ffi.jax.run(plan, *tensors, sm_scales=1.0)
    out = np.full_like(tensors[0], np.nan)
    plan.paged_run(*tensors, out, sm_scale=0.0625)
    found = fi_ffi.jax.run(plan, *tensors, sm_scale=0.0625)
    assert np.asarray(found).tobytes() == out.tobytes()


def test_a_plan_of_several_outputs():
    class Pod:
        def run(self, q_p, k_p, v_p, o_p, q_d, k_d, v_d, o_d, *, stream=None):
            raise AssertionError

    with pytest.raises(fi_ffi.ArgumentError, match="`plan`: got Pod, expected a plan whose run wr"):
        fi_ffi.jax.run(Pod(), *[np.ones(3)] * 6)


def test_too_few_arrays(rng):
    service = Service(SERVED["decode"], Cpu(), rng)
    case, batch = service.case, service.batch()
    plan = case.plan(batch)
    words = (
        "BatchDecodePlan.run: argument `args`: got 2 arrays, expected 3: q, paged_k_cache, paged_v"
    )
    with pytest.raises(fi_ffi.ArgumentTypeError, match=words):
        fi_ffi.jax.run(plan, *given(case, batch)[:2])


def test_a_scanned_loop_of_layers(rng):
    """Each layer attends to its own cache, by one plan."""
    service = Service(SERVED["decode"], Cpu(), rng)
    case, batch = service.case, service.batch()
    plan = case.plan(batch)
    q, k, v = given(case, batch)
    ks, vs = (
        np.stack([cache * np.float16(1 - layer / 8) for layer in range(4)]) for cache in (k, v)
    )

    @jax.jit
    def layers(q, ks, vs):
        def one(q, cache):
            return fi_ffi.jax.run(plan, q, *cache), None

        return jax.lax.scan(one, q, (ks, vs))[0]

    wanted = q
    for layer in range(4):
        out = np.full_like(wanted, np.nan)
        plan.run(wanted, ks[layer], vs[layer], out)
        wanted = out
    assert np.asarray(layers(q, ks, vs)).tobytes() == wanted.tobytes()
