"""FlashInfer's names for an argument: a plan takes each, and refuses an argument given twice."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import fi_ffi

from tests.attention.test_batch_attention import HEADS, arrays
from tests.helpers import batch_pod_calls, pod_calls, sparse_calls
from tests.helpers.calls import HostArray
from tests.helpers.plan_calls import Case, refused

# What FlashInfer's other wrappers, or its own, call an argument.
_PAGED = {
    "paged_kv_indptr": "indptr", "paged_kv_indices": "kv_indices",
    "paged_kv_last_page_len": "last_page_len", "head_dim_qk": "head_dim",
}  # fmt: skip
_DECODE = {
    "indptr": "paged_kv_indptr", "indices": "paged_kv_indices",
    "last_page_len": "paged_kv_last_page_len", "head_dim": "head_dim_qk",
}  # fmt: skip
_LENGTHS = {"kv_indptr": "paged_kv_indptr", "kv_indices": "indices"}
_SIZE = {"head_dim": "head_dim_qk"}
# FlashInfer's own for the first three; the batches of both halves have the names of its wrapper.
_POD = {
    "paged_kv_indptr": "indptr", "paged_kv_indices": "indices",
    "paged_kv_last_page_len": "last_page_len", **_SIZE,
}  # fmt: skip
_BATCH_POD = _SIZE | {
    f"paged_kv_{array}_{half}": f"{other}_{half}"
    for array, other in (("indptr", "kv_indptr"), ("indices", "kv_indices"),
                         ("last_page_len", "last_page_len"))
    for half in "pd"
}  # fmt: skip
_CASCADE = {"paged_kv_last_page_len_arr": "paged_kv_last_page_len", "head_dim_qk": "head_dim"}


def _of_case(kind):
    def check(rng):
        case = Case(kind)
        plan = case.plan()
        case.replan(plan)
        case.run(plan)
        case.check()

    return check


def _of_spec(name):
    def check(rng):
        assert sparse_calls.SPECS[name].check(rng, HostArray, "cpu", None) <= 1

    return check


def _pod(rng):
    batch = pod_calls.Batch(pod_calls.Spec(), rng)
    plan = batch.plan(device="cpu")
    plan.replan(batch.indptr, paged_kv_indices=batch.indices, paged_kv_last_page_len=batch.last)
    assert batch.run(plan, HostArray, None, 1 << 20) <= 1


def _batch_pod(rng):
    batch = batch_pod_calls.Batch(batch_pod_calls.Spec(), rng)
    plan = batch.plan(device="cpu")
    plan.replan(*batch.planned())
    assert batch.run(plan, HostArray, None) <= 1


def _batch_attention(rng):
    """A key of each request outweighs the rest, so its value is the output."""
    plan = fi_ffi.BatchAttentionPlan(**arrays(), **HEADS, q_data_type="float16", device="cpu")
    plan.replan(**arrays())
    q, cache = np.full((4, 4, 64), 16, np.float16), np.zeros((6, 4, 2, 64), np.float16)
    v, o = rng.standard_normal(cache.shape).astype(np.float16), np.full_like(q, np.nan)
    cache[5, 1] = cache[2, 3] = 1
    plan.run(q, cache, v, o)
    seen = np.stack([v[5, 1]] * 3 + [v[2, 3]]).repeat(2, axis=1)
    assert np.abs(o - seen).max() <= 2.0**-8 * np.abs(seen).max()


PLANS = {
    "paged": (fi_ffi.BatchPrefillPlan, _PAGED, _of_case("paged")),
    "decode": (fi_ffi.BatchDecodePlan, _DECODE, _of_case("decode")),
    "decode, as of MLA": (
        fi_ffi.BatchDecodePlan,
        {"indptr": "kv_indptr", "indices": "kv_indices", "last_page_len": "kv_last_page_len"},
        _of_case("decode"),
    ),
    "MLA": (fi_ffi.BatchMlaPlan, _LENGTHS, _of_case("mla")),
    "batch attention": (
        fi_ffi.BatchAttentionPlan,
        {**_LENGTHS, "head_dim_qk": "head_dim", "q_data_type": "data_type"},
        _batch_attention,
    ),
    "POD": (fi_ffi.PodPlan, _POD, _pod),
    "batch POD": (fi_ffi.BatchPodPlan, _BATCH_POD, _batch_pod),
    "blocks": (fi_ffi.BlockSparseAttentionPlan, _SIZE, _of_spec("blocks")),
    "variable blocks": (fi_ffi.VariableBlockSparseAttentionPlan, _SIZE, _of_spec("variable")),
    "cascade": (fi_ffi.MultiLevelCascadePlan, _CASCADE, _of_spec("one level")),
    "shared prefix": (fi_ffi.SharedPrefixPlan, _PAGED, _of_spec("shared prefix")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_takes_other_names(name, rng, monkeypatch):
    cls, others, check = PLANS[name]
    renamed = set()
    for method in ("__init__", "replan"):
        real = getattr(cls, method)
        parameters = inspect.signature(real)

        def call(self, *args, real=real, parameters=parameters, **given):
            bound = parameters.bind(self, *args, **given).arguments
            bound |= bound.pop("options", {})
            del bound["self"]
            renamed.update(others.keys() & bound.keys())
            real(self, **{others.get(each, each): value for each, value in bound.items()})

        monkeypatch.setattr(cls, method, call)
    check(rng)
    assert renamed == others.keys()


@pytest.mark.parametrize("kind", ["paged", "decode", "mla"])
def test_an_argument_by_two_names_is_refused(kind):
    case = Case(kind)
    plan, before = case.plan(), case.bytes()
    names = {"paged": _PAGED, "decode": _DECODE, "mla": _LENGTHS}[kind]
    for own, other in names.items():
        twice = {other: (case.arrays | case.options)[own]}
        error = refused(case, other, f"{own} or {other}", case.cls, **case.arrays, **case.options,
                        **twice, device="cpu")  # fmt: skip
        assert isinstance(error, TypeError)
        if own in case.arrays:
            refused(case, other, f"{own} or {other}", case.replan, plan, **twice)
    assert case.bytes() == before
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'sm_scale'; pass it to each run"
    ):
        case.plan(sm_scale=0.5)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'qo_indptrs'"):
        case.replan(plan, qo_indptrs=1)
    case.run(plan)
    case.check()


def test_by_position_and_by_another_name():
    case = Case("decode")
    starts, indices, last = case.arrays.values()
    for other in ("kv_indptr", "paged_kv_indptr"):
        refused(case, other, f"indptr or {other}", case.plan, **{other: starts})
    plan = case.plan()
    refused(case, "kv_indices", "indices or kv_indices", plan.replan, starts, indices,
            kv_last_page_len=last, kv_indices=indices)  # fmt: skip
    two = {"kv_indptr": starts, "paged_kv_indptr": starts}
    refused(case, "paged_kv_indptr", "indptr or", plan.replan, indices=indices, last_page_len=last,
            **two)  # fmt: skip
    with pytest.raises(TypeError, match="required"):
        plan.replan(kv_indptr=starts, kv_indices=indices)
    plan.replan(starts, indices, kv_last_page_len=last)
    case.run(plan)
    case.check()


def test_options_by_position_are_told():
    """As FlashInfer's `plan` takes them."""
    case = Case("decode")
    arrays = [*case.arrays.values()]
    with pytest.raises(TypeError, match=r"3 by position \(indptr, indices, last_page_len\), not 7"):
        case.cls(*arrays, 8, 2, 64, 16)
    plan = case.plan()
    with pytest.raises(TypeError, match=r"replan\(\) takes from 1 to 4 positional"):
        plan.replan(*arrays, 16)
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", ["paged", "decode", "mla"])
def test_what_wrappers_have_and_plans_lack(kind):
    plan = Case(kind).plan()
    with pytest.raises(AttributeError, match=r"'plan': the constructor plans, and replan\(...\)"):
        plan.plan()
    if kind == "paged":
        with pytest.raises(AttributeError, match="'run', but ragged_run and paged_run"):
            plan.run()


@pytest.mark.parametrize("plan", ["BlockSparseAttentionPlan", "BatchDecodePlan", "single_decode"])
def test_supports_takes_other_names(plan):
    ask = getattr(fi_ffi, plan).supports
    assert ask(90, release="0.6.13", head_dim_qk=128) == ask(90, release="0.6.13", head_dim=128)
    twice = ask(90, release="0.6.13", head_dim=128, head_dim_qk=128)
    assert not twice and "not both" in twice.reason


@pytest.mark.parametrize("name", PLANS)
def test_one_spelling_is_shown(name):
    cls, others, _ = PLANS[name]
    for shown in (inspect.signature(cls), inspect.signature(cls.replan)):
        assert not shown.parameters.keys() & set(others.values())
