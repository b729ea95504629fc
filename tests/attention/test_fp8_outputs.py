"""Outputs rounded to fp8 by the kernels: which attention has them, and what is too large."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers.calls import called

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
GIVEN = {"num_qo_heads": 4, "num_kv_heads": 2}
_DECODE = "decode_with_kv_cache_dtype_q_f16_dtype_kv_f16"
_MODULE = "{}_{}_{}head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
# What prefill kernels are asked for in vain, by the method that tells.
PREFILLS = {
    "BatchPrefillPlan": {"head_dim_qk": 128, "page_size": 16, **GIVEN},
    "single_prefill": {},
    "MultiLevelCascadePlan": {},
    "BlockSparseAttentionPlan": {},
}


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_what_is_too_large_is_the_largest(dtype, machine, rng):
    """Of one key the output is its value, rounded once."""
    largest = float(ml_dtypes.finfo(dtype).max)
    keys = rng.standard_normal((3, 1, 2, 128)).astype(np.float16)
    drawn = rng.standard_normal(keys.shape) * largest * 0.6
    values = np.clip(drawn, -65504, 65504).astype(np.float16)
    exact = values[:, 0].astype(float).repeat(2, axis=1)
    expected = np.clip(exact, -largest, largest).astype(dtype)
    assert (np.abs(exact) > largest).any() and np.isfinite(expected.astype(float)).all()
    queries = rng.standard_normal((3, 4, 128)).astype(np.float16)
    of = f"dtype_o_{'e4m3' if dtype is E4M3 else 'e5m2'}"
    machine.need(_MODULE.format(f"batch_{_DECODE}", of, "dtype_idx_i32_"))
    plan = fi_ffi.BatchDecodePlan(
        np.int32([0, 1, 2, 3]), np.int32([0, 1, 2]), np.int32([1, 1, 1]), head_dim=128, page_size=1,
        o_data_type=dtype, device=machine.device, stream=machine.stream, **GIVEN,
    )  # fmt: skip
    assert plan.module == _MODULE.format(f"batch_{_DECODE}", of, "dtype_idx_i32_")
    names = {"q": queries, "paged_k_cache": keys, "paged_v_cache": values}
    poisoned = np.full((3, 4, 128), np.nan, dtype)
    got = called(plan.run, names | {"o": poisoned}, machine.place, ("o",), stream=machine.stream)
    assert (got["o"] == expected).all()
    machine.need(_MODULE.format(f"single_{_DECODE}", of, ""))
    tmp = np.zeros(64, np.uint8)
    one = {"q": queries[0], "k": keys[0], "v": values[0], "tmp": tmp, "o": poisoned[0]}
    got = called(fi_ffi.single_decode, one, machine.place, ("tmp", "o"), stream=machine.stream)
    assert (got["o"] == expected[0]).all()


def test_a_run_has_the_planned_dtype(rng):
    plan = fi_ffi.BatchDecodePlan(
        np.int32([0, 1]), np.int32([0]), np.int32([1]), head_dim=128, page_size=1,
        o_data_type="float8_e4m3fn", device="cpu", **GIVEN,
    )  # fmt: skip
    q, cache = np.zeros((1, 4, 128), np.float16), np.zeros((1, 1, 2, 128), np.float16)
    for dtype in (np.float16, E5M2):
        out = np.full(q.shape, np.nan, dtype)
        with pytest.raises(fi_ffi.ArgumentError, match=r"`o`.*expected float8_e4m3fn"):
            plan.run(q, cache, cache, out)
        assert np.isnan(out.astype(float)).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_prefill_has_none(dtype):
    words = r"prefill kernels write 16-bit elements; BatchDecodePlan, single_decode and xqa have"
    indptr = np.int32([0, 2])
    for queries in ("float16", "float8_e4m3fn"):
        with pytest.raises(fi_ffi.ArgumentError, match=f"`o_data_type`: got {dtype}.*{words}"):
            fi_ffi.BatchPrefillPlan(
                indptr, kv_indptr=indptr, head_dim_qk=128, o_data_type=dtype, q_data_type=queries,
                device="cpu", **GIVEN,
            )  # fmt: skip
    q, k = np.zeros((2, 4, 128), np.float16), np.zeros((2, 2, 128), np.float16)
    out = np.full(q.shape, np.nan, dtype)
    with pytest.raises(fi_ffi.ArgumentError, match=f"`o`: got {dtype}.*{words}"):
        fi_ffi.single_prefill(q, k, k, np.zeros(64, np.uint8), out)
    assert np.isnan(out.astype(float)).all()


@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_says_so_when_asked(name):
    found = getattr(fi_ffi, name).supports(90, o_data_type="float8_e4m3fn", **PREFILLS[name])
    assert found.status == "refused" and "16-bit elements" in found.reason, found


@pytest.mark.parametrize("name", ["BatchDecodePlan", "single_decode"])
def test_decode_says_which_module(name):
    found = getattr(fi_ffi, name).supports(90, o_data_type="float8_e4m3fn")
    assert found.status == "missing" and "dtype_o_e4m3" in f"{found.module}", found
