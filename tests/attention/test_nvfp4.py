"""Keys and values of 4 bits: what is refused, what is taken in other words, and the judge."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.backends import Kernel
from fi_ffi.ops.attention.values import OWN_STRIDES
from fi_ffi.ops.call.releases import release_in_force

from tests.attention import judge
from tests.attention.cases import E4M3, dequantised, make
from tests.attention.tables import Spec

RAGGED = Spec(kv_dtype="uint8", lengths=((3, 9), (2, 5)))
PAGED = Spec(kv_dtype="uint8", lengths=((3, 9), (2, 5)), page_size=4)
SINGLE = Spec(kv_dtype="uint8", lengths=((3, 9),), family="single_prefill")
KINDS = {"ragged": RAGGED, "paged": PAGED, "single": SINGLE}
each_kind = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)


def changed(desc: TensorDesc, **fields: Any) -> TensorDesc:
    given = {"ptr": desc.ptr, "shape": desc.shape, "dtype": desc.dtype, "strides": desc.strides}
    given |= {"device": desc.device} | fields
    return TensorDesc(given.pop("ptr"), given.pop("shape"), given.pop("dtype"), **given)


def test_the_numbers_of_a_byte():
    """The first in the lower half; by ml_dtypes' own numbers."""
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    numbers = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.full((16, 2), 0.5).astype(E4M3)
    scales[:, 1] = 3
    got = dequantised(packed, scales)
    assert got.shape == (16, 32)
    assert got[7, 5] == 0.5 * numbers[7] and got[2, 30] == 3 * numbers[15]


@each_kind
def test_scales_that_are_refused(spec, machine, rng):
    case, batch = make(spec, machine, rng)
    plan, given = case.plan(batch), case.run_options(batch)
    k_sf, v_sf = given["k_cache_sf"], given["v_cache_sf"]
    inner = (*k_sf.shape[:-1], k_sf.shape[-1] // 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k_cache_sf": None}, "k_cache_sf.*got NoneType, expected scales"),
        ({"v_cache_sf": None}, "v_cache_sf.*got NoneType, expected scales"),
        ({"k_cache_sf": changed(k_sf, shape=inner)}, "k_cache_sf.*head_dim_qk"),
        ({"v_cache_sf": changed(v_sf, shape=v_sf.shape[1:], strides=v_sf.strides[1:])}, "rank"),
        ({"k_cache_sf": changed(k_sf, dtype="float8_e5m2")}, "k_cache_sf.*e4m3fn"),
        ({"k_cache_sf": changed(k_sf, ptr=k_sf.ptr + 2)}, "multiple of 4 bytes"),
    ]  # fmt: skip
    if not (spec.page_size and have_own_strides(machine)):
        apart = changed(v_sf, strides=(2 * v_sf.strides[0], *v_sf.strides[1:]))
        wrong.append(({"v_cache_sf": apart}, "v_cache_sf.*expected an eighth of .*strides"))
    for changes, words in wrong:
        out = case.outputs()
        with pytest.raises(fi_ffi.ArgumentError, match=words):
            case.run(plan, batch, out, **changes)
        assert np.isnan(out.o.get()).all()
    case.check(batch, case.run(plan, batch))


def have_own_strides(machine):
    """Whether the kernels find pages' scales by the scales' strides."""
    return not machine.is_gpu or is_in(release_in_force(), OWN_STRIDES)


def test_scales_of_pages_that_lie_otherwise(machine, rng):
    """Apart from one another, beside keys and values that are not."""
    case, batch = make(PAGED, machine, rng)
    plan = case.plan(batch)
    for name in ("k_sf", "v_sf"):
        scales = case.tensors[name]
        apart = np.full((*scales.shape[:-1], scales.shape[-1] + 4), 0xFF, np.uint8).view(E4M3)
        apart[..., :-4] = scales
        case.tensors[name] = apart[..., :-4]
    if have_own_strides(machine):
        case.check(batch, case.run(plan, batch))
    else:
        with pytest.raises(fi_ffi.ArgumentError, match="an eighth of .*strides"):
            case.run(plan, batch)


@each_kind
def test_strides_that_no_scales_have(spec, machine, rng):
    """Of keys, where they are no multiple of what the kernels load scales of."""
    case, batch = make(spec, machine, rng)
    plan = case.plan(batch)
    for name in "kv":
        packed, scales = case.tensors[name], case.tensors[f"{name}_sf"]
        wide = np.zeros((*packed.shape[:-1], packed.shape[-1] + 16), np.uint8)
        wide[..., :-16] = packed
        case.tensors[name] = wide[..., :-16]
        wide_scales = np.zeros((*scales.shape[:-1], scales.shape[-1] + 2), np.uint8).view(E4M3)
        wide_scales[..., :-2] = scales
        case.tensors[f"{name}_sf"] = wide_scales[..., :-2]
    with pytest.raises(fi_ffi.ArgumentError, match="multiples of 4"):
        case.run(plan, batch)


@each_kind
def test_other_dtypes_of_the_same_bytes(spec, machine, rng):
    """Scales as bytes, keys as pairs of 4-bit numbers: as FlashInfer takes them."""
    case, batch = make(spec, machine, rng)
    plan, given, out = case.plan(batch), case.run_options(batch), case.outputs()
    scales = {name: changed(given[name], dtype="uint8") for name in ("k_cache_sf", "v_cache_sf")}
    q, k, v = case.inputs(case.rows)
    k, v = (changed(of, dtype="float4_e2m1fn_x2") for of in (k, v))
    o, lse = out.o.desc(), out.lse.desc()
    if spec.family == "single_prefill":
        tmp = machine.place(np.zeros(1 << 20, np.uint8)).desc()
        fi_ffi.single_prefill(q, k, v, tmp, o, lse, **scales, stream=machine.stream)
    else:
        run = plan.paged_run if spec.page_size else plan.ragged_run
        run(q, k, v, o, lse, **scales, stream=machine.stream)
    case.check(batch, out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos_encoding_mode": "ROPE_LLAMA"}, "ROPE_LLAMA.* keys of 8 or 4 bits"),
        ({"backend": "fa3"}, "fa3 takes float16 queries with keys of that dtype only"),
        ({"q_data_type": "float8_e4m3fn"}, "backend"),
        ({"head_dim_qk": 96}, "head_dim_qk.*got 96, expected a multiple of 64"),
        ({"head_dim_vo": 96}, "head_dim_vo.*got 96, expected a multiple of 64"),
        ({"use_attention_sink": True}, "kv_data_type"),
    ],
)
def test_plans_that_are_refused(changes, words):
    given = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 128, "kv_data_type": "uint8"}
    starts = np.int32([0, 2])
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        fi_ffi.BatchPrefillPlan(starts, kv_indptr=starts, device="cpu", **given | changes)


def test_modules_are_called_after_what_each_release_does():
    kernel = Kernel("batch_prefill", "float16", "uint8", "float16", 128, 128)
    for of, word in (("0.6.10", "u8"), ("0.6.16", "u8"), ("0.7.1", "fp4x2_e2m1")):
        assert f"_dtype_kv_{word}_" in kernel.module("fa2", of)
    with pytest.raises(fi_ffi.ArgumentError, match="dtype_kv"):
        kernel.module("fa2", "0.6.9")


def test_where_there_are_none():
    one, pages = np.int32([0, 1]), {"num_qo_heads": 4, "num_kv_heads": 2, "page_size": 4}
    given = pages | {"head_dim": 128, "kv_data_type": "uint8", "device": "cpu"}
    with pytest.raises(fi_ffi.ArgumentError, match="kv_data_type.*BatchPrefillPlan"):
        fi_ffi.BatchDecodePlan(one, one[:1], one[1:], **given)
    with pytest.raises(fi_ffi.ArgumentError, match="only BatchPrefillPlan has keys"):
        fi_ffi.PodPlan(one, paged_kv_indices=one[:1], paged_kv_last_page_len=one[1:], **given)
    q, kv = np.zeros((2, 128), np.float16), np.zeros((5, 2, 64), np.uint8)
    with pytest.raises(fi_ffi.ArgumentError, match="argument `k`: got uint8"):
        fi_ffi.single_decode(q, kv, kv, kv[0, 0], q.copy())


def test_scales_of_other_keys(machine, rng):
    """Keys of 16 bits have none."""
    case, batch = make(Spec(lengths=((3, 9),)), machine, rng)
    plan = case.plan(batch)
    for name in ("k_cache_sf", "v_cache_sf"):
        with pytest.raises(fi_ffi.ArgumentError, match=f"{name}.*expected None.*of float16"):
            case.run(plan, batch, **{name: np.zeros((9, 2, 8), E4M3)})
    case.check(batch, case.run(plan, batch))


def test_a_prepared_run(machine, rng):
    case, batch = make(PAGED, machine, rng)
    plan, out, given = case.plan(batch), case.outputs(), case.run_options(batch)
    tensors = dict(
        zip(("q", "paged_k_cache", "paged_v_cache"), case.inputs(case.rows), strict=True)
    )
    options = given | {"o": out.o.desc(), "lse": out.lse.desc(), "stream": machine.stream}
    prepared = fi_ffi.prepare(plan.paged_run, **tensors, **options)
    prepared()
    case.check(batch, out)
    other = changed(given["v_cache_sf"], ptr=given["k_cache_sf"].ptr)
    prepared.update(v_cache_sf=other)
    prepared()
    with pytest.raises(AssertionError, match="of its bound"):
        case.check(batch, out)


def exchanged(packed: np.ndarray) -> np.ndarray:
    return packed >> 4 | packed << 4


OTHERS = {
    "halves exchanged": ("k", exchanged),
    "scales of other blocks": ("v_sf", lambda scales: np.roll(scales, 1, axis=-1)),
    "scales twice as large": ("k_sf", lambda scales: (2 * scales.astype(np.float32)).astype(E4M3)),
}


@pytest.mark.parametrize(("name", "other"), OTHERS.values(), ids=OTHERS)
def test_the_judge_sees(name, other, machine, rng):
    case, batch = make(RAGGED, machine, rng)
    result = case.run(case.plan(batch), batch)
    case.check(batch, result)
    case.tensors[name] = other(case.tensors[name])
    with pytest.raises(AssertionError, match="of its bound"):
        case.check(batch, result)


def test_bounds_are_those_of_keys_of_16_bits():
    """What numbers and scales make is exact in both dtypes of queries."""
    assert judge.rounding("batch_prefill", "fa2", "float16", "uint8", "float16") == judge.rounding(
        "batch_prefill", "fa2", "float16", "float16", "float16"
    )
