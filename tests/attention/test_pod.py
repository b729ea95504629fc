"""`PodPlan` on CPU tensors, against float64; and bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import generation
from fi_ffi.ops.call import compiled

from tests.attention.prepared import on_each
from tests.helpers import pod_calls
from tests.helpers.calls import HostArray, refused
from tests.helpers.pod_calls import Batch, Spec

SPECS = pod_calls.SPECS | {
    "without lse": Spec(lse=False),
    "scale": Spec(scale=0.3, group=16),
    "narrow": Spec(head_dim=64, group=1),
    "windows": Spec(causal=True, window_left_p=20, window_left=9),
    "their own keys alone": Spec(causal=True, window_left_p=0, window_left=0),
    "a window of the prefill": Spec(window_left_p=0),
    "a window of the decode": Spec(window_left=0),
}


@pytest.fixture
def batch():
    return Batch(Spec(), np.random.default_rng())


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name):
    batch = Batch(SPECS[name], np.random.default_rng())
    plan = batch.plan(device="cpu")
    assert batch.run(plan, HostArray, None, 1 << 20) <= 1
    other = Batch(replace(SPECS[name], lengths=(33, 2)), np.random.default_rng())
    plan.replan(other.indptr, paged_kv_indices=other.indices, paged_kv_last_page_len=other.last)
    assert other.run(plan, HostArray, None, 1 << 20) <= 1


@pytest.mark.parametrize("window", [-1, 0, 1])
@pytest.mark.parametrize("of_prefill", [-1, 0, 1])
def test_modules_of_windows(of_prefill, window, monkeypatch):
    """A kernel without windows is compiled for -1 alone."""
    seen, real = [], compiled.entry_for

    def entry_for(row, device, module=None):
        seen.append(module or row.module)
        return real(row, device, module)

    monkeypatch.setattr(compiled, "entry_for", entry_for)
    spec = Spec(window_left_p=of_prefill, window_left=window)
    batch = Batch(spec, np.random.default_rng())
    generation.advance()
    assert batch.run(batch.plan(device="cpu"), HostArray, None, 1 << 20) <= 1
    (module,) = {name for name in seen if name.startswith("pod_with_kv_cache")}
    wanted = f"use_swa_p_{of_prefill >= 0}", f"use_swa_d_{window >= 0}"
    assert all(part in module for part in wanted), module


def test_the_judge_sees_a_wrong_result(batch):
    right = batch.expected()
    batch.spec, batch.expected = replace(batch.spec, causal=True), lambda: right
    assert batch.run(batch.plan(device="cpu"), HostArray, None, 1 << 20) > 1


@pytest.fixture
def gpu(monkeypatch):
    yield from on_each("pretended gpu", monkeypatch)


@pytest.mark.parametrize("kind", ["capturing", "non_blocking"])
def test_a_prepared_run_is_refused_where_a_run_is(kind, batch, gpu):
    """When it is launched: a stream captures now and not then, and a scope's may be any."""
    arrays = {name: gpu.place(array) for name, array in batch.arrays(1 << 20).items()}
    given = {name: array.desc() for name, array in arrays.items()}
    plan = batch.plan(device=gpu.device, stream=gpu.stream)
    call = fi_ffi.prepare(plan.run, **given, stream=gpu.stream)
    in_scope = fi_ffi.prepare(plan.run, **given)
    call()
    assert not np.isnan(arrays["o_p"].get()).any() and not np.isnan(arrays["o_d"].get()).any()
    streams = getattr(gpu.runtime, kind)
    streams.add(gpu.stream)
    for name in ("o_p", "o_d"):
        gpu.poison(arrays[name], gpu.stream)
    with pytest.raises(fi_ffi.ArgumentError, match="PodPlan: argument `stream`"):
        call()
    with fi_ffi.stream(gpu.stream):
        with pytest.raises(fi_ffi.ArgumentError, match="PodPlan: argument `stream`"):
            in_scope()
        with pytest.raises(fi_ffi.ArgumentError, match="PodPlan: argument `stream`"):
            plan.run(**given)
    assert np.isnan(arrays["o_p"].get()).all() and np.isnan(arrays["o_d"].get()).all()
    streams.clear()
    call()
    assert not np.isnan(arrays["o_p"].get()).any()


RUNS = {
    "no queries": ("q_p", np.zeros((0, 8, 128), np.float16), "at least 1"),
    "no keys": ("k_p", np.zeros((0, 2, 128), np.float16), "at least 1"),
    "rank of q": ("q_p", np.zeros((8, 128), np.float16), "rank 3"),
    "rank of k": ("k_p", np.zeros((8, 128), np.float16), "rank 3"),
    "heads of q": ("q_p", np.zeros((40, 4, 128), np.float16), "num_qo_heads = 8"),
    "heads of k": ("k_p", np.zeros((90, 4, 128), np.float16), "num_kv_heads = 2"),
    "bfloat16": ("v_p", np.zeros((90, 2, 128), np.float32), "float16"),
    "requests": ("q_d", np.zeros((3, 8, 128), np.float16), "b = 4"),
    "pages": ("paged_k_cache_d", np.zeros((1, 16, 2, 128), np.float16), "num_pages = 1"),
    "a page": ("paged_k_cache_d", np.zeros((99, 8, 2, 128), np.float16), "page_size = 16"),
    "tmp": ("tmp_p", None, "Tensor"),
    "window": ("window_left_p", -2, "from -1"),
    "layout": ("kv_layout_d", "NDH", "NHD"),
    "scale": ("sm_scale_p", 0.0, "above"),
    "mask": ("custom_mask_p", np.zeros(3, np.uint8), "450 bytes"),
    "causal": ("causal_p", 1, "bool"),
}


@pytest.mark.parametrize("name", RUNS)
def test_refusals_of_runs(name, batch):
    argument, value, words = RUNS[name]
    arrays = batch.arrays(1 << 20)
    plan = batch.plan(device="cpu")
    arrays.pop("lse_p"), arrays.pop("lse_d")
    refused(plan.run, arrays, "", words, op="PodPlan", **{argument: value})


def test_causal_and_a_mask(batch):
    arrays = batch.arrays(1 << 20)
    mask = np.packbits(batch.visible, bitorder="little")
    with pytest.raises(fi_ffi.ArgumentError, match="False with custom_mask_p"):
        batch.plan(device="cpu").run(**arrays, custom_mask_p=mask, causal_p=True)


def test_fewer_keys_than_causal_queries():
    batch = Batch(Spec(qo_len=9, kv_len=8), np.random.default_rng())
    with pytest.raises(fi_ffi.ArgumentError, match="9 keys or more"):
        batch.plan(device="cpu").run(**batch.arrays(1 << 20), causal_p=True)


def test_refusals_of_plans(batch):
    with pytest.raises(fi_ffi.ArgumentError, match="at most 16"):
        Batch(Spec(group=17), np.random.default_rng()).plan(device="cpu")
    batch.indptr, batch.last = batch.indptr[:1], batch.last[:0]
    with pytest.raises(fi_ffi.ArgumentError, match="one or more"):
        batch.plan(device="cpu")
    for option in ("backend", "enable_cuda_graph", "causal"):
        with pytest.raises(TypeError, match=option):
            batch.plan(device="cpu", **{option: True})


def test_partial_results_need_room(batch, monkeypatch):
    monkeypatch.setattr(fi_ffi.PodPlan, "_machine", (132, 9))
    big = Batch(Spec(qo_len=4, kv_len=4000), np.random.default_rng())
    plan = big.plan(device="cpu")
    arrays = big.arrays(16)
    with pytest.raises(fi_ffi.ArgumentError, match="bytes or more") as caught:
        plan.run(**arrays)
    assert caught.value.argument == "tmp_p"
