"""`PodPlan` on a GPU against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi

from tests.helpers.pod_calls import Batch, Spec

SPECS = {
    "plain": Spec(),
    "causal": Spec(causal=True),
    "mask": Spec(mask=True),
    "HND": Spec(layout="HND"),
    "one of each": Spec(qo_len=1, kv_len=1, lengths=(1,)),
    "split prefill": Spec(qo_len=3, kv_len=5000),
    "split decode": Spec(lengths=(9000, 3)),
    "long prefill": Spec(qo_len=600, kv_len=700, causal=True, lengths=tuple(range(1, 60))),
    "many": Spec(lengths=tuple(range(1, 300)), group=1, kv_heads=4),
    "group of 16": Spec(group=16, kv_heads=1),
}


@pytest.fixture
def waiting_stream():
    """A stream that waits for the default one."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    made = check(runtime.cudaStreamCreate())
    yield int(made)
    check(runtime.cudaStreamSynchronize(made))
    check(runtime.cudaStreamDestroy(made))


def run(spec, rng, to_gpu, stream) -> float:
    batch = Batch(spec, rng)
    heads = spec.kv_heads * spec.group, spec.kv_heads
    tmp = fi_ffi.single_prefill_workspace_size(spec.qo_len, spec.kv_len, *heads, spec.head_dim)
    try:
        return batch.run(batch.plan(stream=stream), to_gpu, stream, tmp)
    except fi_ffi.KernelNotFoundError as error:
        pytest.skip(f"{error}".splitlines()[0])


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng, to_gpu, waiting_stream, record_property):
    worst = max(run(SPECS[name], rng, to_gpu, waiting_stream) for _ in range(2))
    record_property("error_of_bound", worst)
    assert worst <= 1


def test_many_runs_on_the_default_stream(rng, to_gpu):
    for _ in range(20):
        assert run(replace(SPECS["plain"], lse=False), rng, to_gpu, 0) <= 1


def test_streams_that_do_not_wait_are_refused(rng, to_gpu, stream, waiting_stream):
    run(SPECS["plain"], rng, to_gpu, waiting_stream)
    batch = Batch(SPECS["plain"], rng)
    arrays = {name: to_gpu(array) for name, array in batch.arrays(1 << 24).items()}
    plan = batch.plan(stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match="cudaStreamNonBlocking"):
        plan.run(**{name: array.desc() for name, array in arrays.items()}, stream=stream)
    given = {name: array.desc() for name, array in arrays.items()}
    call = fi_ffi.prepare(plan.run, **given, stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match="cudaStreamNonBlocking"):
        call()
    assert np.isnan(arrays["o_p"].get()).all()
