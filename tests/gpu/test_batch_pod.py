"""`BatchPodPlan` on a GPU against float64."""

from __future__ import annotations

import pytest

import fi_ffi

from tests.helpers.batch_pod_calls import Batch, Spec

SPECS = {
    "plain": Spec(),
    "causal": Spec(causal=True),
    "HND": Spec(layout="HND"),
    "one of each": Spec(prefills=((1, 1),), lengths=(1,)),
    "split prefill": Spec(prefills=((3, 5000),)),
    "split decode": Spec(lengths=(9000, 3)),
    "long prefills": Spec(prefills=((600, 700), (1, 900), (300, 300)), causal=True,
                          lengths=tuple(range(1, 60))),
    "many": Spec(lengths=tuple(range(1, 300)), group=1, kv_heads=4,
                 prefills=tuple((n, 2 * n) for n in range(1, 40))),
    "group of 16": Spec(group=16, kv_heads=1),
    "scale": Spec(scale=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng, to_gpu, stream, record_property):
    worst, plan = 0.0, None
    for _ in range(3):
        batch = Batch(SPECS[name], rng)
        try:
            if plan is None:
                plan = batch.plan(stream=stream)
            else:
                plan.replan(*batch.planned(), stream=stream)
            worst = max(worst, batch.run(plan, to_gpu, stream))
        except fi_ffi.KernelNotFoundError as error:
            pytest.skip(f"{error}".splitlines()[0])
    record_property("error_of_bound", worst)
    assert worst <= 1
