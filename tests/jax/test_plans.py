"""Plans inside jax.jit: made outside, planned again between calls, against float64."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest

import fi_ffi.jax

from tests.attention.cases import Result, Service
from tests.attention.machines import Cpu
from tests.attention.tables import SERVED
from tests.helpers.in_jit import Found, given

# What jax raises for a call that fails: at once, or where its result is waited for.
FAILURES = (ValueError, jax.errors.JaxRuntimeError)


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_planned_again_between_calls(spec, rng):
    """One compiled program, for requests of other lengths each time."""
    service = Service(spec, Cpu(), rng)
    case, batch = service.case, service.batch()
    plan = case.plan(batch)
    options = case.run_options(batch)
    run = jax.jit(lambda *tensors: fi_ffi.jax.run(plan, *tensors, lse=spec.lse, **options))
    for _ in range(3):
        found = run(*given(case, batch))
        o, lse = found if spec.lse else (found, None)
        case.check(batch, Result(Found(o), None if lse is None else Found(lse)))
        batch = service.batch()
        case.replan(plan, batch)


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


def test_too_few_arrays(rng):
    service = Service(SERVED["decode"], Cpu(), rng)
    case, batch = service.case, service.batch()
    plan = case.plan(batch)
    words = "BatchDecodePlan: argument `args`: got 2 arrays, expected 3: q, paged_k_cache, paged_v"
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
