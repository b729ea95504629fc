"""`xqa_mla` on CPU tensors, against float64; and every kind of bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine

from tests.helpers.calls import HostArray, refused
from tests.helpers.xqa_mla_calls import BF16, FP8, Batch, Spec

SCALE = 192**-0.5
SPECS = {
    "plain": Spec(options={"q_scale": SCALE}),
    "fp8": Spec(dtype=FP8, page_size=64, options={"q_scale": SCALE}),
    "one request": Spec(lengths=(5,), options={"q_scale": SCALE}),
    "long": Spec(lengths=(900, 1), page_size=128, options={"q_scale": SCALE}),
    "a head before the tokens": Spec(axis=1, page_size=32, options={"q_scale": SCALE}),
    "a head after the tokens": Spec(axis=2, dtype=FP8, options={"q_scale": SCALE}),
    "values apart": Spec(apart=True, options={"q_scale": SCALE}),
    "scales": Spec(options={"q_scale": 0.25, "kv_scale": 0.5}),
    "scale tensors": Spec(dtype=FP8, options={
        "q_scale": np.float32([0.125]), "kv_scale": np.float32([1.5])}),
    "no scale": Spec(lengths=(3, 20)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng):
    assert Batch(SPECS[name], rng).check(HostArray) <= 1


def test_no_request(rng):
    batch = Batch(Spec(lengths=(1,)), rng)
    some = ("q", "output", "page_table", "seq_lens")
    assert fi_ffi.xqa_mla(**{n: a[:0] if n in some else a for n, a in batch.arrays.items()}) is None


def test_an_axis_of_one_has_any_stride(rng):
    """As `lengths[:, None]` has it on a GPU."""
    batch = Batch(SPECS["plain"], rng)
    given = {name: fi_ffi.as_desc(array) for name, array in batch.arrays.items()}
    lens = given["seq_lens"]
    given["seq_lens"] = fi_ffi.TensorDesc(
        lens.ptr, lens.shape, "uint32", strides=(1, 0), device="cpu"
    )
    fi_ffi.xqa_mla(**given, **batch.spec.options)
    value, size = batch.expected()
    got = batch.arrays["output"].astype(np.float64)
    assert (np.abs(got - value) <= np.maximum(size * 2.0**-7, 2.0**-20)).all()


@pytest.mark.parametrize("options", [{"q_scale": 1.3 * SCALE}, {"kv_scale": 1.05}], ids=str)
def test_the_judge_sees_a_wrong_result(options, rng):
    batch = Batch(SPECS["plain"], rng)
    right = batch.expected()
    batch.spec = replace(batch.spec, options=batch.spec.options | options)
    batch.expected = lambda: right
    assert batch.check(HostArray) > 1


def test_memory_of_the_callers(rng):
    """A counter and two buffers for each request."""
    given = {
        "semaphores": np.zeros(4, np.uint32),
        "workspace_buffer": HostArray(np.zeros(4 * 18432, np.uint8)).array,
    }
    options = {"q_scale": SCALE, "sm_count": 7}
    batch = Batch(Spec(options=options), rng)
    fi_ffi.xqa_mla(**batch.arrays, **given, **options)
    assert np.isfinite(batch.arrays["output"].astype(float)).all()
    for name, words in (("semaphores", "16 bytes or more"), ("workspace_buffer", "73728 bytes")):
        with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
            fi_ffi.xqa_mla(**batch.arrays, **given | {name: given[name][:-1]})
        assert caught.value.argument == name


def _wrong() -> dict[str, tuple[dict[str, object], str, str]]:
    f32, caches = np.float32, ("k_cache", "v_cache")
    two, wide = np.zeros((20, 16, 2, 576), BF16), np.zeros((20, 32, 576), BF16)
    fp8 = {name: np.zeros((20, 16, 576), FP8) for name in caches}
    narrow = {name: np.zeros((20, 16, 512), BF16) for name in caches}
    small = {name: np.zeros((20, 8, 576), BF16) for name in caches}
    return {
        "rank of q": ({"q": np.zeros((4, 128, 576), BF16)}, "q", "rank 4"),
        "two queries": ({"q": np.zeros((4, 2, 128, 576), BF16)}, "q", "1"),
        "64 heads": ({"q": np.zeros((4, 1, 64, 576), BF16),
                      "output": np.zeros((4, 1, 64, 512), BF16)}, "", "num_qo_heads of 128"),
        "q in float16": ({"q": np.zeros((4, 1, 128, 576), np.float16)}, "q", "bfloat16 or float8"),
        "keys in fp8": (fp8, "k_cache", "bfloat16"),
        "narrow keys": (narrow, "", "head_dim"),
        "pages of 8": (small, "", "page_size of 16"),
        "two heads of keys": ({"k_cache": two}, "k_cache", "axis of 1"),
        "rank of keys": ({"k_cache": np.zeros((320, 576), BF16)}, "k_cache", "axis of 1"),
        "no tokens": ({"k_cache": np.zeros((20, 0, 576), BF16)}, "k_cache", "axis of 1"),
        "values of other strides": (
            {"k_cache": wide[:, :16].copy(), "v_cache": wide[:, :16]}, "v_cache",
            "those of `k_cache`"),
        "output of 576": ({"output": np.zeros((4, 1, 128, 576), BF16)}, "output", "512"),
        "output in fp8": ({"output": np.zeros((4, 1, 128, 512), FP8)}, "output", "bfloat16"),
        "rank of the table": ({"page_table": np.zeros(4, np.int32)}, "page_table", "rank 2"),
        "table of int64": ({"page_table": np.zeros((4, 9), np.int64)}, "page_table", "int32"),
        "lengths of int64": ({"seq_lens": np.ones((4, 1), np.int64)}, "seq_lens", "uint32"),
        "scale": ({"q_scale": float("nan")}, "q_scale", "finite"),
        "scale of two": ({"kv_scale": np.ones(2, f32)}, "kv_scale", "1"),
        "multiprocessors": ({"sm_count": 0}, "sm_count", "from 1"),
        "none": ({"v_cache": None}, "v_cache", "Tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _wrong())
def test_refusals(name, rng):
    given, argument, words = _wrong()[name]
    batch = Batch(SPECS["plain"], rng)
    refused(fi_ffi.xqa_mla, batch.arrays, argument, words, **given)


def test_other_gpus(monkeypatch, rng):
    monkeypatch.setattr(machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 132)
    descs = {
        name: fi_ffi.TensorDesc(i << 32, array.shape, array.dtype, device="cuda:0")
        for i, (name, array) in enumerate(Batch(SPECS["plain"], rng).arrays.items(), 1)
    }
    scratch = fi_ffi.TensorDesc(1 << 40, (1 << 20,), "uint8")
    counters = fi_ffi.TensorDesc(1 << 41, (1 << 10,), "uint32")
    with pytest.raises(fi_ffi.ArchitectureError, match=r"9\.0"):
        fi_ffi.xqa_mla(**descs, workspace_buffer=scratch, semaphores=counters, stream=0)


def test_asked_about():
    found = fi_ffi.xqa_mla.supports(sm=90, release="0.6.13")
    assert found.status == "refused" and "12.x" in found.reason, found
    assert fi_ffi.xqa_mla.supports(sm=120, release="0.6.13").status != "refused"


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_prepared(dtype, rng):
    spec = Spec(dtype=dtype, lengths=(3, 20), options={"q_scale": SCALE})
    first, second = (Batch(spec, rng) for _ in range(2))
    call = fi_ffi.prepare(fi_ffi.xqa_mla, **first.arrays, q_scale=SCALE)
    assert np.isnan(first.arrays["output"].astype(float)).all()
    call()
    # The caches by their addresses: they were given another axis.
    caches = {name: second.arrays[name].ctypes.data for name in ("k_cache", "v_cache")}
    call.update(**second.arrays | caches)
    call()
    for batch in (first, second):
        value, size = batch.expected()
        got = batch.arrays["output"].astype(float)
        assert (np.abs(got - value) <= size * 2.0**-7).all()
