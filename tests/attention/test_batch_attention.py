"""`BatchAttentionPlan`: what it refuses, and its workspace; its results are in test_results.py."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.plans.batch_attention import workspace_need

from tests.helpers.calls import refused

PAGE, DIM = 4, 64
HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": DIM, "page_size": PAGE}


def arrays(**changes):
    given = {
        "qo_indptr": [0, 3, 4], "kv_indptr": [0, 2, 3], "kv_indices": [5, 0, 2],
        "kv_len_arr": [7, 4],
    } | changes  # fmt: skip
    return {name: np.array(value, np.int32) for name, value in given.items()}


def plan(changes=(), **options):
    return fi_ffi.BatchAttentionPlan(**arrays(**dict(changes)), **HEADS | options, device="cpu")


PLANS = {
    "keys of the other 16 bits": ({}, {"kv_data_type": "float16"}, "kv_data_type", "nor the"),
    "queries in fp8": ({}, {"q_data_type": "float8_e4m3fn"}, "q_data_type", "float16 or"),
    "heads": ({}, {"num_qo_heads": 3}, "num_qo_heads", "a multiple of num_kv_heads = 2"),
    "fewer keys": ({"kv_len_arr": [7, 1], "qo_indptr": [0, 3, 5]}, {"causal": True}, "qo_indptr",
                   "no fewer keys with causal=True"),
    "tokens of another number of pages": ({"kv_len_arr": [9, 4]}, {}, "kv_len_arr", "fill its"),
    "a page below 0": ({"kv_indices": [5, -1, 2]}, {}, "kv_indices", "from 0 on"),
    "soft cap": ({}, {"logits_soft_cap": -1.0}, "logits_soft_cap", "0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_refusals_of_plans(name):
    changes, options, argument, words = PLANS[name]
    with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
        plan(changes, **options)
    assert (caught.value.op, caught.value.argument) == ("BatchAttentionPlan", argument)


def test_tokens_are_counted_in_32_bits():
    """The pages that are listed, whether they differ or not."""
    wide = {"page_size": 2**30, "enable_cuda_graph": True}
    pages = {"kv_indptr": [0, 2, 4], "kv_indices": [0, 0, 0, 0]}
    full = {"kv_len_arr": [2**31 - 1, 2**31 - 1]}
    with pytest.raises(fi_ffi.ArgumentError, match="less than 4294967296 tokens") as caught:
        plan(pages | full, **wide)
    assert caught.value.argument == "kv_indptr"
    assert plan({"kv_len_arr": [2**31 - 1, 2**30]}, **wide).plan_info


def test_options_that_there_are_not():
    for option in ("window_left", "backend", "pos_encoding_mode", "use_custom_mask"):
        with pytest.raises(TypeError, match=option):
            plan(**{option: 1})


@pytest.fixture
def run():
    """The tensors of a right run."""
    q = np.ones((4, 4, DIM), ml_dtypes.bfloat16)
    cache = np.ones((6, PAGE, 2, DIM), ml_dtypes.bfloat16)
    return {"q": q, "k_cache": cache, "v_cache": cache.copy(), "o": np.full_like(q, np.nan)}


RUNS = {
    "queries": ("q", np.ones((3, 4, DIM), ml_dtypes.bfloat16), "nnz_qo = 4, as planned"),
    "a page": ("k_cache", np.ones((6, 8, 2, DIM), ml_dtypes.bfloat16), "page_size = 4"),
    "pages": ("k_cache", np.ones((5, PAGE, 2, DIM), ml_dtypes.bfloat16), "num_pages"),
    "strides": ("v_cache", np.ones((6, PAGE, 2, 2 * DIM), ml_dtypes.bfloat16)[..., :DIM],
                "those of `k_cache`"),
    "dtype": ("o", np.ones((4, 4, DIM), np.float16), "bfloat16"),
    "indices": ("kv_indices", np.zeros(3, np.int32), "the plan has them"),
    "scale of keys": ("k_scale", 0.0, "above"),
    "scale of values": ("v_scale", float("nan"), "finite"),
    "layout": ("kv_layout", "HDN", "NHD"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_refusals_of_runs(name, run):
    argument, value, words = RUNS[name]
    refused(plan().run, run, "", words, op="BatchAttentionPlan", **{argument: value})


def test_its_planner_sets_the_same_aside_for_every_batch():
    """As read in `TwoStageHolisticPlan`: two kinds of tiles with ten arrays of 65,536 each, and
    the most pieces of queries that so many blocks can make, of 16 bits and their logarithms."""
    h100 = sizes.Geometry(32, 8, 128, 16, 132, 9)
    pieces = 4 * 2 * 132 * (128 + 16)
    need = workspace_need(h100)
    assert need.int_bytes == 2 * 10 * 65536 * 4 + 16 + 2 * 4 * pieces + 4
    assert need.float_bytes == pieces * 8 * (2 * 128 + 4)
    one_block = workspace_need(sizes.Geometry(32, 8, 256, 16, 132, 9))
    assert one_block.float_bytes == pieces // 2 * 8 * (2 * 256 + 4)


def test_it_can_be_asked_for():
    found = fi_ffi.BatchAttentionPlan.supports(sm=90, q_data_type="float16", logits_soft_cap=30.0)
    assert found.module.startswith("batch_attention_with_kv_cache_dtype_q_f16")
    assert "use_logits_soft_cap_true" in found.module
    assert not fi_ffi.BatchAttentionPlan.supports(sm=90, kv_data_type="float16")
