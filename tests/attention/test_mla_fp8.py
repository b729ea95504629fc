"""Latent attention over caches of fp8: what is refused, which releases and GPUs have it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention.backends import Target
from fi_ffi.ops.attention.options import MlaOptions

from tests.attention.cases import CKV_SCALE, KPE_SCALE, make
from tests.attention.tables import Spec

E4M3 = "float8_e4m3fn"
FP8 = Spec(family="batch_mla", dtype="bfloat16", dim=512, heads=16, page_size=16,
           lengths=((3, 40), (1, 7)), kv_dtype=E4M3)  # fmt: skip
GROUPS = Spec(**vars(FP8) | {"scales": " groups"})
BF16 = Spec(**vars(FP8) | {"kv_dtype": ""})
ONE, BOTH = "expected ckv_scale or ckv_scale_arr, one of them", "got both"


def refused(case: Any, batch: Any, plan: Any, words: str, **changes: Any) -> None:
    """A run is refused in these words and writes nothing."""
    out = case.outputs()
    with pytest.raises((fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError), match=words):
        case.run(plan, batch, out, **changes)
    assert np.isnan(out.o.get().astype(np.float32)).all()


def test_scales_that_are_refused(machine, rng):
    case, batch = make(FP8, machine, rng)
    plan = case.plan(batch)
    for changes, words in (
        ({"ckv_scale": None}, f"ckv_scale.*got 'neither', {ONE}|ckv_scale.*got neither, {ONE}"),
        ({"kpe_scale": None}, "kpe_scale.*got None, expected a number, with a float8_e4m3fn"),
        ({"ckv_scale": 0.0}, "ckv_scale.*above 0"), ({"kpe_scale": -1.0}, "kpe_scale.*above 0"),
        ({"kpe_scale": float("inf")}, "kpe_scale.*finite"), ({"ckv_scale": "x"}, "ckv_scale"),
        ({"ckv_scale": True}, "ckv_scale.*a number"),
    ):  # fmt: skip
        refused(case, batch, plan, words, **changes)
    case.check(batch, case.run(plan, batch))


def test_scales_of_groups_that_are_refused(machine, rng):
    case, batch = make(GROUPS, machine, rng)
    plan, given = case.plan(batch), case.placed("groups").desc()

    def shaped(*shape: int, dtype: str = "float32") -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(given.ptr, shape, dtype, device=given.device)

    pages, size, _ = given.shape
    for changes, words in (
        ({"ckv_scale": 1.0}, BOTH),
        ({"ckv_scale_arr": shaped(pages, size, 3)}, "ckv_scale_arr.*head_dim_ckv/128"),
        ({"ckv_scale_arr": shaped(pages - 1, size, 4)}, "ckv_scale_arr.*num_pages"),
        ({"ckv_scale_arr": shaped(pages, 4 * size)}, "ckv_scale_arr.*rank"),
        ({"ckv_scale_arr": shaped(pages, size, 4, dtype="float16")}, "ckv_scale_arr.*float32"),
        ({"ckv_scale_arr": 3}, "ckv_scale_arr"),
    ):  # fmt: skip
        refused(case, batch, plan, words, **changes)
    case.check(batch, case.run(plan, batch))


@pytest.mark.parametrize("name", ["ckv_scale", "kpe_scale", "ckv_scale_arr"])
def test_scales_of_other_caches(name, machine, rng):
    case, batch = make(BF16, machine, rng)
    value = np.ones((3, 16, 4), np.float32) if name.endswith("arr") else 1.0
    words = f"{name}.*expected None with a cache of bfloat16"
    refused(case, batch, case.plan(batch), words, **{name: value})


def test_each_scale_is_of_its_part(machine, rng):
    """What is twice as large moves the result, and moves it back when queries are halved."""
    case, batch = make(FP8, machine, rng)
    plan = case.plan(batch)
    before = case.run(plan, batch).o.get().astype(np.float64)
    for changes in ({"ckv_scale": 2 * CKV_SCALE}, {"kpe_scale": 2 * KPE_SCALE}):
        after = case.run(plan, batch, case.outputs(), **changes).o.get().astype(np.float64)
        assert not np.allclose(before, after)
        if "ckv_scale" in changes:  # values are twice as large
            assert np.abs(after).mean() > 1.5 * np.abs(before).mean()


@pytest.mark.parametrize("dtype", [E4M3, "float8_e5m2", "uint8"])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(fi_ffi.ArgumentError, match="kv_data_type.*expected float16$"):
        MlaOptions(num_heads=16, page_size=16, q_data_type="float16", kv_data_type=dtype)
    if dtype != E4M3:
        with pytest.raises(fi_ffi.ArgumentError, match="expected bfloat16 or float8_e4m3fn"):
            MlaOptions(num_heads=16, page_size=16, kv_data_type=dtype)


@pytest.mark.parametrize(
    ("release", "capability", "backend", "expected"),
    [
        ("0.7.2.post1", (9, 0), "auto", "fa3"), ("0.7.2.post1", (9, 0), "fa2", "fa2"),
        ("0.6.18", (9, 0), "fa2", "fa2"), ("0.6.14", (9, 0), "auto", "fa3"),
        ("0.6.17", (9, 0), "fa2", "in FlashInfer >=0.6.18, not in 0.6.17"),
        ("0.6.13", (9, 0), "auto", "in FlashInfer >=0.6.14, not in 0.6.13"),
        ("0.7.2.post1", (8, 0), "auto", "for SM90, and the GPU is SM80"),
        (None, None, "auto", "fa2"), (None, None, "fa3", "fa3"),
    ],
)  # fmt: skip
def test_who_has_it(release, capability, backend, expected):
    options = MlaOptions(num_heads=16, page_size=16, kv_data_type=E4M3, backend=backend)
    target = Target("BatchMlaPlan", capability, release)
    if expected in ("fa2", "fa3"):
        assert options.choose(target).backend == expected
    else:
        with pytest.raises(fi_ffi.ArgumentError, match=expected):
            options.choose(target)


def test_supports():
    ask = fi_ffi.BatchMlaPlan.supports
    found = ask(sm=90, release="0.7.2.post1", kv_data_type=E4M3)
    assert found.status == "missing" and "dtype_kv_e4m3" in found.build and "sm90" in found.build
    assert ask(sm=90, release="0.6.13", kv_data_type=E4M3).status == "refused"
    assert ask(sm=80, release="0.7.2.post1", kv_data_type=E4M3).status == "refused"


def test_values_are_rounded_to_bfloat16(rng):
    """One token: the output is its dequantised values."""
    ckv = rng.standard_normal((1, 1, 512)).astype(ml_dtypes.float8_e4m3fn)
    kpe = np.zeros((1, 1, 64), ckv.dtype)
    q, q_pe = (np.ones((1, 16, n), ml_dtypes.bfloat16) for n in (512, 64))
    starts, page = np.int32([0, 1]), np.int32([0])
    plan = fi_ffi.BatchMlaPlan(starts, starts, page, np.int32([1]), num_heads=16, page_size=1,
                               kv_data_type=E4M3, device="cpu")  # fmt: skip
    out = np.zeros_like(q)
    plan.run(q, q_pe, ckv, kpe, out, ckv_scale=0.7, kpe_scale=1.0)
    expected = ckv[0, 0].astype(ml_dtypes.bfloat16) * np.array(0.7, ml_dtypes.bfloat16)
    assert (out[0] == expected).all()
