"""Replanning the quick way leaves what a plan made afresh leaves."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention import plan as plans

PAGED = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
RAGGED = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 64}


@pytest.fixture
def quick(monkeypatch) -> list[bool]:
    """Whether each replan went the quick way."""
    went, alone = [], plans.Plan.plan_again

    def watched(self, *args):
        went.append(alone(self, *args))
        return went[-1]

    monkeypatch.setattr(plans.Plan, "plan_again", watched)
    return went


def starts(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def left(plan) -> tuple[list[int], dict[str, bytes]]:
    """What the planner returned, and the index arrays in the workspace."""
    arrays = {}
    for name, desc in plan._descs.items():
        if desc.dtype.name == "int32":
            buffer = np.frombuffer(
                plans.ffi.buffer(plans.cuda.pointer(desc.ptr), 4 * desc.shape[0]), np.int32
            )
            arrays[name] = buffer.copy()
    return plan.plan_info, arrays


def check_alike(plan, fresh, counts: dict[str, int]) -> None:
    (info, arrays), (wanted, others) = left(plan), left(fresh)
    assert info == wanted
    for name, count in counts.items():
        assert np.array_equal(arrays[name][:count], others[name][:count]), name


def test_decode(rng, quick):
    def batch(size: int):
        pages = rng.integers(0, 9, size)
        pages[0] = max(pages[0], 1)
        last = rng.integers(1, 17, size) if rng.random() < 0.8 else np.where(pages, 16, 0)
        return starts(pages), rng.permutation(pages.sum()).astype(np.int32), last.astype(np.int32)

    plan = fi_ffi.BatchDecodePlan(*batch(5), **PAGED, q_data_type="float16", device="cpu")
    for _ in range(300):
        arrays = batch(int(rng.choice([3, 5, 8])))
        plan.replan(*arrays)
        fresh = fi_ffi.BatchDecodePlan(*arrays, **PAGED, q_data_type="float16", device="cpu")
        size, total = len(arrays[2]), int(arrays[0][-1])
        check_alike(plan, fresh, {"kv_indptr": size + 1, "last_page_len": size, "indices": total})
        assert (plan._batch_size, plan._num_indices) == (fresh._batch_size, fresh._num_indices)
        assert plan._max_page == fresh._max_page
    assert quick.count(True) > 10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_ragged_prefill(backend, causal, rng, quick):
    def batch(size: int):
        queries = rng.integers(0, int(rng.choice([3, 40, 400])), size)
        return starts(queries), starts(queries + rng.integers(0, 2) * rng.integers(0, 9, size))

    def made(qo, kv):
        return fi_ffi.BatchPrefillPlan(
            qo, kv_indptr=kv, **RAGGED, q_data_type="float16", backend=backend, causal=causal,
            device="cpu",
        )  # fmt: skip

    plan = made(*batch(5))
    for _ in range(300):
        qo, kv = batch(int(rng.choice([3, 5])))
        plan.replan(qo, kv_indptr=kv)
        check_alike(plan, made(qo, kv), {"qo_indptr": len(qo), "kv_indptr": len(kv)})
        assert (plan._rows_now, plan._kv_total) == (int(qo[-1]), int(kv[-1]))
        assert plan._batch_size == len(qo) - 1
    assert quick.count(True) > 10


def test_what_is_wrong_is_refused_as_ever(rng, quick):
    qo = starts([3, 4, 5])
    plan = fi_ffi.BatchPrefillPlan(
        qo, kv_indptr=qo, **RAGGED, q_data_type="float16", backend="fa2", causal=True, device="cpu"
    )
    plan.replan(qo, kv_indptr=qo)
    assert quick == [True]
    for wrong, argument in (
        ([0, 3, 2, 12], "qo_indptr"), ([1, 3, 7, 12], "qo_indptr"), ([0, 13, 13, 13], "qo_indptr"),
    ):  # fmt: skip
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            plan.replan(np.array(wrong, np.int32), kv_indptr=qo)
        assert caught.value.argument == argument
    with pytest.raises(fi_ffi.ArgumentError, match="int32"):
        plan.replan(qo.astype(np.int64), kv_indptr=qo)
    assert quick == [True]
    assert plan.plan_info  # it still holds
