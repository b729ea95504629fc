"""`BatchPodPlan` on CPU tensors, against float64; and bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi

from tests.helpers import batch_pod_calls
from tests.helpers.batch_pod_calls import Batch, Spec
from tests.helpers.calls import HostArray, refused

SPECS = batch_pod_calls.SPECS | {
    "window": Spec(causal=True, window_left=20),
    "window, all later keys": Spec(window_left=20),
    "their own keys alone": Spec(causal=True, window_left=0),
    "without lse": Spec(lse=False),
    "scale": Spec(scale=0.3, group=16, kv_heads=1),
    "narrow": Spec(head_dim=64, group=1, page_size=5),
}


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng):
    batch = Batch(SPECS[name], rng)
    plan = batch.plan(device="cpu")
    assert batch.run(plan, HostArray, None) <= 1
    other = Batch(replace(SPECS[name], lengths=(33, 2), prefills=((5, 50),)), rng)
    plan.replan(*other.planned())
    assert other.run(plan, HostArray, None) <= 1


def test_the_judge_sees_a_wrong_result(rng):
    batch = Batch(Spec(causal=True), rng)
    plan = batch.plan(device="cpu")
    batch.spec = replace(batch.spec, causal=False)
    assert batch.run(plan, HostArray, None) > 1


def test_a_prepared_run(rng):
    """It holds through a replan: both halves are packed anew."""
    batch = Batch(Spec(lengths=(20, 30), prefills=((5, 50), (3, 9))), rng)
    plan = batch.plan(device="cpu")
    arrays = batch.arrays()
    call = fi_ffi.prepare(plan.run, **arrays)
    other = (
        batch.qo["p"], *batch.where["p"][:2], batch.where["p"][2] - 1, *batch.where["d"][:2],
        batch.where["d"][2] - 1,
    )  # fmt: skip
    for planned in (batch.planned(), other):
        plan.replan(*planned)
        again = batch.arrays()
        plan.run(**again)
        call()
        for name in ("o_p", "o_d"):
            assert arrays[name].tobytes() == again[name].tobytes()


RUNS = {
    "queries": ("q_p", np.zeros((57, 8, 128), np.float16), "58 queries, as planned"),
    "rank": ("paged_k_cache_p", np.zeros((9, 16, 256), np.float16), "rank 4"),
    "pages": ("paged_k_cache_p", np.zeros((2, 16, 2, 128), np.float16), "pages or more of 16"),
    "a page": ("paged_k_cache_p", np.zeros((19, 8, 2, 128), np.float16), "pages or more of 16"),
    "strides": ("paged_v_cache_p", np.zeros((13, 16, 2, 136), np.float16)[..., :128],
                "the strides of the keys"),
    "requests": ("q_d", np.zeros((3, 8, 128), np.float16), "b = 4"),
    "pages of the decode": ("paged_k_cache_d", np.zeros((1, 16, 2, 128), np.float16), "num_pages"),
    "layout": ("kv_layout", "NDH", "NHD"),
    "scale": ("sm_scale_p", 0.0, "above"),
    "pdl": ("enable_pdl", 1, "bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_refusals_of_runs(name, rng):
    argument, value, words = RUNS[name]
    batch = Batch(Spec(), rng)
    run = batch.plan(device="cpu").run
    refused(run, batch.arrays(), "", words, op="BatchPodPlan", **{argument: value})


def test_refusals_of_plans(rng):
    with pytest.raises(fi_ffi.ArgumentError, match="at most 16"):
        Batch(Spec(group=17), rng).plan(device="cpu")
    with pytest.raises(fi_ffi.ArgumentError, match="no queries") as caught:
        Batch(Spec(prefills=((0, 5),)), rng).plan(device="cpu")
    assert (caught.value.op, caught.value.argument) == ("BatchPodPlan", "qo_indptr_p")
    with pytest.raises(fi_ffi.ArgumentError, match="one or more") as caught:
        Batch(Spec(lengths=()), rng).plan(device="cpu")
    assert caught.value.argument == "paged_kv_last_page_len_d"
    with pytest.raises(fi_ffi.ArgumentError, match="one for each half"):
        Batch(Spec(), rng).plan(device="cpu", workspaces=[None])
    with pytest.raises(fi_ffi.ArgumentError, match="no fewer keys") as caught:
        Batch(Spec(causal=True, prefills=((9, 8),)), rng).plan(device="cpu")
    assert caught.value.argument == "qo_indptr_p"


@pytest.mark.parametrize("option", ["backend", "logits_soft_cap", "use_custom_mask", "causal"])
def test_what_pod_kernels_are_not_told(option, rng):
    with pytest.raises(TypeError, match=option):
        Batch(Spec(), rng).plan(device="cpu", **{option: True})


@pytest.mark.parametrize("plan", [fi_ffi.PodPlan, fi_ffi.BatchPodPlan])
def test_runs_of_prefills_are_not_there(plan):
    assert plan._run_methods == ("run",)
    for run in ("paged_run", "ragged_run"):
        assert not hasattr(plan, run)


@pytest.mark.parametrize("why", ["a last page", "no room"])
def test_a_half_s_replan_is_both_s(why, rng):
    """What refuses one half leaves the other as it was."""
    batch, other = Batch(Spec(), rng), Batch(Spec(prefills=((40, 60), (18, 9))), rng)
    need = batch.plan(device="cpu").size
    rooms = [(1 << 24, 1 << 20), need]
    workspaces = [fi_ffi.Workspace.allocate("cpu", *room) for room in rooms]
    plan = batch.plan(workspaces=workspaces)
    bad, words = [*other.planned()], "from 1 to 16"
    if why == "no room":
        bad[4:] = Batch(Spec(lengths=(20000,) * 4), rng).planned()[4:]
        words = "as workspace_size tells"
    else:
        bad[6] = bad[6] + 16
    with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
        plan.replan(*bad)
    assert caught.value.op == "BatchPodPlan"
    assert batch.run(plan, HostArray, None) <= 1
