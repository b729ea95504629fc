"""Block-sparse attention and cascades on CPU tensors, against dense attention in float64."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import support

from tests.helpers.calls import HostArray
from tests.helpers.sparse_calls import DIM, SPECS, Sparse, drawn

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2}


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng):
    assert SPECS[name].check(rng, HostArray, "cpu", None) <= 1


def test_the_judge_sees_a_wrong_result(rng, monkeypatch):
    """A block more than there is."""
    blocks = fi_ffi.BlockSparseAttentionPlan.run

    def run(self, q, k, v, o, lse, **more):
        self.replan(np.int32([0, 1, 2, 3]), np.int32([0, 1, 2]))
        blocks(self, q, k, v, o, lse, **more)

    monkeypatch.setattr(fi_ffi.BlockSparseAttentionPlan, "run", run)
    assert Sparse(density=0.9).check(rng, HostArray, "cpu", None) > 1


def blocks(indptr=(0, 1, 3), indices=(0, 1, 3), **options):
    sizes = {"M": 20, "N": 64, "R": 16, "C": 16, "head_dim": DIM, **HEADS}
    return fi_ffi.BlockSparseAttentionPlan(
        np.int32(indptr), np.int32(indices), device="cpu", **sizes | options
    )


def variable(mask=None, rows=((3, 4),) * 2, columns=((5, 6, 7),) * 2, **options):
    mask = np.ones((2, 2, 3), bool) if mask is None else mask
    return fi_ffi.VariableBlockSparseAttentionPlan(
        mask, np.array(rows), np.array(columns), head_dim=DIM, device="cpu", **HEADS | options
    )


def cascade(**changes):
    level = [np.int32([0, 2]), np.int32([0, 1]), np.int32([0]), np.int32([3])]
    given = {
        "qo_indptr_arr": [level[0]] * 2, "paged_kv_indptr_arr": [level[1]] * 2,
        "paged_kv_indices_arr": [level[2]] * 2, "paged_kv_last_page_len_arr": [level[3]] * 2,
        "page_size": 4, "head_dim_qk": DIM, "device": "cpu", **HEADS,
    }  # fmt: skip
    return fi_ffi.MultiLevelCascadePlan(**given | changes)


LEVELS = ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr",
          "paged_kv_last_page_len_arr")  # fmt: skip


def prefix(**changes):
    given = {
        "num_shared": 5, "qo_indptr": None, "paged_kv_indptr": np.int32([0, 1]),
        "paged_kv_indices": np.int32([0]), "paged_kv_last_page_len": np.int32([3]),
        "page_size": 4, "head_dim_qk": DIM, "device": "cpu", **HEADS,
    }  # fmt: skip
    return fi_ffi.SharedPrefixPlan(**given | changes)


PLANS = {
    "rows of blocks": (lambda: blocks(indptr=(0, 3)), "indptr", "3 elements"),
    "a column past the last": (lambda: blocks(indices=(0, 1, 4)), "indices", "below N / C = 4"),
    "columns that are cut": (lambda: blocks(N=60), "N", "a multiple of C = 16"),
    "no rows": (lambda: blocks(M=0), "M", "from 1"),
    "variable: blocks": (lambda: variable(np.ones((3, 2, 3), bool)), "block_mask_map", "booleans"),
    "variable: numbers": (lambda: variable(np.ones((2, 2, 3))), "block_mask_map", "booleans"),
    "variable: rows": (lambda: variable(rows=((3, 4), (3, 5))), "block_row_sz", "the same for"),
    "variable: below 0": (lambda: variable(rows=((8, -1), (3, 4))), "block_row_sz", "0 or more"),
    "variable: columns": (lambda: variable(columns=((5, 6),) * 2), "block_col_sz", "integers of"),
    "variable: heads": (lambda: variable(num_qo_heads=3), "num_qo_heads", "a multiple of"),
    "levels": (lambda: cascade(paged_kv_indices_arr=[]), "paged_kv_indices_arr", "for each level"),
    "no levels": (
        lambda: cascade(**dict.fromkeys(LEVELS, ())), LEVELS[0],
        "got 0 arrays, expected 1: an array for each level"),
    "queries of levels": (
        lambda: cascade(qo_indptr_arr=[np.int32([0, 2]), np.int32([0, 3])]), "qo_indptr_arr",
        "the same in every level"),
    "workspaces": (lambda: cascade(workspaces=[None]), "workspaces", "one for each level"),
    "heads that cannot be merged": (lambda: cascade(head_dim_qk=96), "head_dim_qk", "be merged"),
    "values that cannot be merged": (
        lambda: prefix(head_dim_qk=128, head_dim_vo=96), "head_dim_qk", "be merged"),
    "shared keys": (lambda: prefix(num_shared=0), "num_shared", "from 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_refusals_of_plans(name):
    make, argument, words = PLANS[name]
    with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
        make()
    assert caught.value.argument == argument
    assert caught.value.op.endswith("Plan")


def test_options_that_depend_on_places():
    for option in ("window_left", "pos_encoding_mode"):
        for make in (blocks, variable, cascade, prefix):
            with pytest.raises(TypeError, match=option):
                make(**{option: 1})


def test_a_refused_replan_keeps_the_sizes():
    plan = variable()
    assert (plan.qo_len, plan.kv_len) == (7, 18)
    with pytest.raises(TypeError):
        plan.replan(np.ones((2, 2, 3), bool), [[8, 8]] * 2, [[5, 6, 9]] * 2, stream="no stream")
    assert (plan.qo_len, plan.kv_len) == (7, 18)


def test_options_that_the_signature_lacks():
    """A plan takes the options in its signature, and no other of a prefill's."""
    for make in (blocks, variable, cascade, prefix):
        with pytest.raises(TypeError, match=r"Plan\(\) got .*'num_colocated_ctas'"):
            make(num_colocated_ctas=1)
        with pytest.raises(TypeError, match=r"Plan\(\) got .*'q_data_typ'.*q_data_type"):
            make(q_data_typ="float16")


@pytest.mark.parametrize("plan", [blocks, variable])
def test_runs_of_other_kinds_are_not_there(plan):
    made = plan()
    for run in ("paged_run", "ragged_run"):
        with pytest.raises(AttributeError, match=f"has no '{run}'"):
            getattr(made, run)
    assert type(made).supports(sm=90, head_dim=64)


def test_refusals_of_runs(rng):
    q, k = drawn(rng, 20, 4, DIM), drawn(rng, 64, 2, DIM)
    o = np.full_like(q, np.nan)
    with pytest.raises(fi_ffi.ArgumentError, match="N = 64 rows, as planned"):
        blocks().run(q, k, k[:48], o)
    with pytest.raises(fi_ffi.ArgumentError, match="nnz_qo = 20"):
        blocks().run(q[:16], k, k.copy(), o)
    with pytest.raises(fi_ffi.ArgumentError, match="contiguous, as planned"):
        variable().run(q, k, k, o)
    assert np.isnan(o).all()


def test_refusals_of_cascades(rng):
    q, cache = drawn(rng, 2, 4, DIM), drawn(rng, 1, 4, 2, DIM)
    o, lse = np.full_like(q, np.nan), np.full((2, 4), np.nan, np.float32)
    plan = cascade()
    for changed, words in (
        ({"tmp_o": o}, "memory of its own"),
        ({"tmp_lse": lse[:1].copy()}, "another tensor like `lse`"),
        ({"paged_v_cache": cache[:, :3]}, "page_size"),
    ):
        given = {
            "q": q, "paged_k_cache": cache, "paged_v_cache": cache.copy(), "o": o, "lse": lse,
            "tmp_o": o.copy(), "tmp_lse": lse.copy(),
        }  # fmt: skip
        with pytest.raises(fi_ffi.ArgumentError, match=words):
            plan.run(**given | changed)
        assert np.isnan(o).all() and np.isnan(lse).all()
    one = [np.int32([0, 2]), np.int32([0, 1]), np.int32([0]), np.int32([3])]
    with pytest.raises(fi_ffi.ArgumentError, match="2 levels, as planned"):
        plan.replan(*([each] for each in one))


def level(pages, last=3):
    """A level's arrays: two queries that see so many pages of its only group."""
    return [np.int32([0, 2]), np.int32([0, pages]), np.arange(pages, dtype=np.int32) % 3,
            np.int32([last])]  # fmt: skip


# Each what the plan is made with, the first level's pages, and the second's that it refuses.
LATE = {
    "a last page": ({}, 2, (1, 9), "from 1 to 4"),
    "a last page, after one that grows": ({}, 40000, (1, 9), "from 1 to 4"),
    "no room": ({"rooms": [(1 << 20, 1 << 16), (1 << 20, 1 << 14)]}, 2, (4000, 3), "21504 bytes"),
    "too many for a graph": (
        {"enable_cuda_graph": True, "max_num_indices": 2}, 2, (3, 3), "2 at most"),
}  # fmt: skip


@pytest.mark.parametrize("make", [cascade, prefix])
@pytest.mark.parametrize("why", LATE)
def test_a_replan_of_levels_is_of_all_or_none(make, why, rng):
    """The second level is refused: runs go on with what both were before."""
    options, many, bad, words = LATE[why]
    options = dict(options)
    if rooms := options.pop("rooms", None):
        options["workspaces"] = [fi_ffi.Workspace.allocate("cpu", *room) for room in rooms]
    plan = make(**options) if make is cascade else make(qo_indptr=np.int32([0, 2]), **options)
    q, cache = drawn(rng, 2, 4, DIM), drawn(rng, 3, 4, 2, DIM)
    given = {"q": q, "paged_k_cache": cache, "paged_v_cache": cache[::-1].copy()}
    if make is prefix:
        given |= {"k_shared": drawn(rng, 6, 2, DIM), "v_shared": drawn(rng, 6, 2, DIM)}

    def result():
        arrays = {name: np.full_like(q, np.nan) for name in ("o", "tmp_o")}
        arrays |= {name: np.full((2, 4), np.nan, np.float32) for name in ("lse", "tmp_lse")}
        plan.run(**given, **arrays)
        return arrays["o"].tobytes(), arrays["lse"].tobytes()

    def replan(first, own):
        if make is prefix:
            plan.replan(6, *own)
        else:
            plan.replan(*map(list, zip(level(first), own, strict=True)))

    before = result()
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        replan(many, level(*bad))
    assert result() == before
    replan(2, level(2))
    assert result() != before


@pytest.mark.parametrize("make", [cascade, prefix])
def test_heads_that_can_be_merged(make):
    """By the size of values, which are merged, where it is another than that of keys."""
    for sizes in ({"head_dim_qk": size} for size in (64, 128, 256, 512)):
        assert repr(make(**sizes)).startswith(f"<{make().op} of 2 levels: <BatchPrefillPlan")
    assert make(head_dim_qk=192, head_dim_vo=128)


def test_each_level_is_run_once(rng, monkeypatch):
    ran, paged_run = [], fi_ffi.BatchPrefillPlan.paged_run

    def run(self, *args, **more):
        ran.append(self)
        paged_run(self, *args, **more)

    monkeypatch.setattr(fi_ffi.BatchPrefillPlan, "paged_run", run)
    for levels in (1, 2, 3):
        plan = cascade(**{n: [a] * levels for n, a in zip(LEVELS, level(1), strict=True)})
        cache = drawn(rng, 1, 4, 2, DIM)
        o, lse = np.empty((2, 4, DIM), np.float16), np.empty((2, 4), np.float32)
        plan.run(drawn(rng, 2, 4, DIM), cache, cache.copy(), o, lse, o.copy(), lse.copy())
        assert len(ran) == levels and {*map(id, ran)} == {*map(id, plan.levels)}
        ran.clear()


@pytest.mark.parametrize("of", [fi_ffi.MultiLevelCascadePlan, fi_ffi.SharedPrefixPlan])
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_a_cascade_needs_a_merge(of, planned, merged, monkeypatch):
    """The judge is asked for both, and answers of what is not there."""
    asked = {}

    def judge(op, given, rows):
        asked[op] = given
        there = merged if rows else planned
        return support.Support(op, "built" if there else "missing", "")

    monkeypatch.setattr(support.judge, "get", lambda: judge)
    place = {"release": "0.6.13", "cuda": "cu130", "kernels": "a folder"}
    found = of.supports(sm=90, head_dim_qk=128, **place)
    assert bool(found) == (planned and merged)
    assert found.op == (of.op if merged or not planned else "merge_state_in_place")
    assert asked.pop(of.op) == {"sm": 90, "head_dim_qk": 128, **place}
    assert asked == {"merge_state_in_place": {"sm": 90, "dtypes": None, **place}}


def test_cascades_are_asked_for_like_prefills():
    for plan in (fi_ffi.MultiLevelCascadePlan, fi_ffi.SharedPrefixPlan):
        assert plan.supports(sm=90, release="0.6.13", q_data_type="bfloat16")
        assert not plan.supports(sm=90, q_data_type="float8_e4m3fn", logits_soft_cap=1.0)


def test_masks_of_blocks():
    mask = np.zeros((2, 2, 3), bool)
    mask[0, 0, 0] = mask[1, 0, 2] = True
    packed = fi_ffi.pack_block_mask(mask, np.int32([0, 1, 2]), 3)
    # The first row of blocks has 6 bits, the second, of one row, 3.
    assert packed.tolist() == [1, 4]
    for wrong, words in (((mask[:1], 3), "shape \\(2, R, C\\)"), ((mask, 5), "2 rows of blocks")):
        with pytest.raises(fi_ffi.ArgumentError, match=words):
            fi_ffi.pack_block_mask(wrong[0], np.int32([0, 1, 2]), wrong[1])
