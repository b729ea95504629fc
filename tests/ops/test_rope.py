"""Rotary embeddings: tokens of no request, a cache's other entries, NaN, what is out of range."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.ops.functions import OPS

from tests.helpers.calls import bits
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs import inputs_of
from tests.helpers.rope_calls import (
    APPLY,
    F16,
    QUANTISE,
    a_case,
)
from tests.helpers.sampling_calls import run

KV = QUANTISE[1]
both = pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])


def quantising(name, rng, tables=None, **more):
    row = OPS[name].row
    sizes = {**inputs_of(row).small, "nnz": 23, "max_seq_len": 70, "rope_dim": 64}
    return make_case(row, sizes, default_dtypes(row) | {"T": "bfloat16"}, rng, tables, **more)


def call(machine, case):
    return run(machine, case.row.name, case.arrays, **case.scalars)


@pytest.mark.parametrize("name", ["apply_rope", "apply_llama31_rope"])
def test_requests_of_any_length(name, machine, rng):
    """None, one token, and more than a thread block has; tokens of no request stay as they were."""
    lengths = [0, 1, 0, 40, 7, 0]
    indptr, nnz = np.cumsum([0, *lengths]), sum(lengths) + 3
    offsets = np.array([5, 0, 9, 1000, 31, 2])
    case = a_case(name, F16, rng, {"indptr": indptr, "offsets": offsets}, nnz=nnz)
    end = sum(lengths)

    def judge(out):
        value, magnitude = (part[:end] for part in case.expected[out])
        cut = replace(case, expected={out: (value, magnitude)})

        def judge_one(got):
            left = bits(got[end:]).tobytes() == bits(case.arrays[out][end:]).tobytes()
            return cut.error(out, got[:end]) if left else (np.inf, np.inf)

        return judge_one

    expected = {out: judge(out) for out in case.expected}
    assert check_on(machine, replace(case, expected=expected)) <= 1


@both
def test_nan_and_infinity_stay_in_their_pairs(interleave, machine, rng):
    for name in APPLY:
        case = a_case(name, F16, rng, interleave=interleave)
        x = case.arrays["q"]
        x[1, 2, 6], x[4, 0, 70] = np.nan, np.inf
        partner = (7, 71) if interleave else (70, 6)
        expected = np.ones(x.shape, bool)
        expected[1, 2, [6, partner[0]]] = expected[4, 0, [70, partner[1]]] = False
        got = call(machine, case)["q_rope"]
        assert (np.isfinite(got.astype(np.float32)) == expected).all()


def random_bytes(array, rng):
    array.view(np.uint8)[...] = rng.integers(0, 256, array.shape, np.uint8)


def touched(case, cache):
    """Which elements of a cache the call writes."""
    marked = np.zeros(cache.shape, bool)
    tokens = marked.swapaxes(1, 2) if case.scalars.get("kv_layout") == "HND" else marked
    size = tokens.shape[1]
    a = case.arrays
    for request, position in zip(a["batch_indices"], a["positions"], strict=True):
        if request >= 0:
            tokens[a["kv_indices"][a["kv_indptr"][request] + position // size], position % size] = 1
    return marked


@pytest.mark.parametrize("name", QUANTISE[1:])
def test_what_is_in_the_cache_stays(name, machine, rng):
    """Every bit of other entries, NaN among them; tokens of no request are left out whole."""
    for more in [{}, {"kv_layout": "HND"}][: 1 + (name == KV)]:
        case = quantising(name, rng, **more)
        caches = [n for n in case.arrays if n.endswith("_cache") and n != "cos_sin_cache"]
        for cache in caches:
            random_bytes(case.arrays[cache], rng)
        left_out = rng.permutation(23)[:5]
        case.arrays["batch_indices"][left_out] = -1
        for out in ("q_rope_out", "q_nope_out"):
            random_bytes(case.arrays[out], rng)
        got = call(machine, case)
        for cache in caches:
            where = touched(case, case.arrays[cache])
            assert 0 < where.sum() < where.size
            now, before = bits(got[cache]), bits(case.arrays[cache])
            assert (now[~where] == before[~where]).all()
            assert (now[where] != before[where]).mean() > 0.5
        for out in ("q_rope_out", "q_nope_out"):
            now, before = bits(got[out]), bits(case.arrays[out])
            assert (now[left_out] == before[left_out]).all()
            value, magnitude = case.expected[out]
            kept = np.setdiff1d(np.arange(23), left_out)
            cut = replace(case, expected={out: (value[kept], magnitude[kept])})
            assert cut.error(out, got[out][kept])[1] <= 1


@pytest.mark.parametrize("name", QUANTISE)
def test_beyond_the_range(name, machine, rng):
    """The largest number that there is, also for infinity; NaN stays."""
    case = quantising(name, rng, quant_scale_q=1e4, quant_scale_kv=0.0)
    x = case.arrays["q_nope_in"]
    x[0, 0, :4] = np.inf, -np.inf, np.nan, 1e4
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    got = call(machine, case)
    q = got["q_nope_out"].astype(np.float64)
    assert q[0, 0, [0, 1, 3]].tolist() == [largest, -largest, largest] and np.isnan(q[0, 0, 2])
    keys = got.get("k_nope_out", got.get("ckv_cache", got.get("k_cache")))
    if name == "rope_quantize":
        assert not keys.astype(np.float64).any()
    assert np.abs(got["q_rope_out"].astype(np.float64)).max() == largest
