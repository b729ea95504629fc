"""`xqa` on CPU tensors, against float64; and every kind of bad input."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine

from tests.helpers.calls import HostArray, refused
from tests.helpers.xqa_calls import BF16, F16, FP8, Batch, Spec

SINKS = {"sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}
SPECS = {
    "plain": Spec(),
    "one request": Spec(lengths=(5,)),
    "no request": Spec(lengths=()),
    "long": Spec(lengths=(3000, 1)),
    "HND": Spec(layout="HND"),
    "f16": Spec(q=F16, kv=F16, page_size=128, group=1),
    "fp8": Spec(q=F16, kv=FP8, page_size=64, group=8, options={"kv_scale": 0.5}),
    "fp8 outputs": Spec(q=F16, kv=FP8, out=FP8, page_size=64, group=8,
                        options={"kv_scale": 0.5, "rcp_out_scale": 20.0}),
    "fp8 outputs of drafts": Spec(q=F16, kv=FP8, out=FP8, queries=4, lengths=(4, 70)),
    "window": Spec(window=20),
    "wide heads": Spec(head_dim=256, group=2, page_size=32),
    "narrow heads": Spec(head_dim=48, group=3),
    "q_scale": Spec(options={"q_scale": 0.25}),
    "q_scale tensor": Spec(options={"q_scale": np.array([0.25], np.float32)}),
    "kv_scale tensor": Spec(kv=FP8, options={"kv_scale": np.array([1.5], np.float32)}),
    "drafts": Spec(queries=4, lengths=(4, 16, 17, 300)),
    "a tree of drafts": Spec(queries=4, tree=True, lengths=(4, 5, 65, 300)),
    "many drafts": Spec(queries=40, tree=True, lengths=(40, 41, 300)),
    "drafts, HND": Spec(queries=3, tree=True, layout="HND", lengths=(4, 64)),
    "drafts, fp8": Spec(q=F16, kv=FP8, queries=5, tree=True, lengths=(5, 70),
                        options={"kv_scale": 0.5}),
    "drafts, sinks": Spec(queries=4, lengths=(9, 70), options=SINKS),
    "sinks": Spec(options=SINKS),
    "lengths of int32": Spec(of_lengths=np.int32),
    "drafts, lengths of int32": Spec(queries=4, lengths=(4, 16, 17, 300), of_lengths=np.int32),
    # The pages hold 20 * 16 keys.
    "drafts, a window of all": Spec(queries=4, tree=True, lengths=(4, 17, 300), window=320),
    "drafts, a window": Spec(queries=4, lengths=(4, 17, 300), window=20),
    "drafts, a window of one": Spec(queries=4, tree=True, lengths=(4, 17, 300), window=1),
    "drafts, a window of all but one": Spec(queries=3, tree=True, lengths=(3, 319), window=319),
    "drafts, a window of more": Spec(queries=4, lengths=(4, 17, 300), window=2**31 - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng):
    if name == "no request":
        batch = Batch(replace(SPECS[name], lengths=(1,)), rng)
        batch.arrays = {
            n: a[:0] if n in ("q", "output", "page_table", "seq_lens") else a
            for n, a in batch.arrays.items()
        }
        assert fi_ffi.xqa(**batch.arrays) is None
        return
    assert Batch(SPECS[name], rng).check(HostArray) <= 1


@pytest.mark.parametrize("page", [2**31 - 1, -1])
def test_pages_that_the_cache_lacks(page, rng):
    """No request's results are written, also not those of requests before it."""
    batch = Batch(SPECS["plain"], rng)
    table, output = batch.arrays["page_table"].copy(), np.full_like(batch.arrays["q"], np.nan)
    table[-1, 0], last = page, len(table) - 1
    fi_ffi.xqa(**batch.arrays)  # scratch memory stays
    with pytest.raises(fi_ffi.ArgumentError, match=f"got {page} in element {last}, 0, ") as caught:
        fi_ffi.xqa(**{**batch.arrays, "page_table": table, "output": output})
    assert (caught.value.op, caught.value.argument) == ("xqa", "page_table")
    assert np.isnan(output.astype(np.float32)).all()


@pytest.mark.parametrize("queries", [1, 4])
def test_lengths_that_the_pages_lack(queries, rng):
    """From a key for each query to as many as the pages hold; other entries of the table are not
    read."""
    batch = Batch(Spec(queries=queries, lengths=(4, 17, 300)), rng)
    table, lengths = batch.arrays["page_table"].copy(), batch.arrays["seq_lens"]
    table[np.arange(table.shape[1]) * 16 >= lengths] = 2**31 - 1
    outputs = [np.full_like(batch.arrays["q"], np.nan) for _ in range(2)]
    for output, pages in zip(outputs, (batch.arrays["page_table"], table), strict=True):
        fi_ffi.xqa(**{**batch.arrays, "page_table": pages, "output": output})
    assert np.isfinite(outputs[0].astype(np.float32)).all()
    assert outputs[0].tobytes() == outputs[1].tobytes()
    most = table.shape[1] * 16
    for length, words in ((queries - 1, f"{queries} or more"), (most + 1, f"= {most} or less")):
        wrong = np.full_like(lengths, 17)
        wrong[2] = length
        with pytest.raises(fi_ffi.ArgumentError, match=f"{words}$") as caught:
            fi_ffi.xqa(**{**batch.arrays, "seq_lens": wrong})
        assert (caught.value.argument, caught.value.got) == (
            "seq_lens",
            f"{length} in element 2, 0",
        )


def test_fp8_outputs_are_scaled(rng):
    """Of one key the output is its value, scaled and rounded; what is too large is the largest."""
    scales = {"kv_scale": 0.5, "rcp_out_scale": 3.3}
    batch = Batch(Spec(kv=FP8, lengths=(1, 1), options=scales), rng)
    output = np.full(batch.arrays["q"].shape, np.nan, FP8)
    pages = batch.arrays["page_table"][:, 0]
    batch.values[pages[1], 0] = np.linspace(-448, 448, 2 * 128).reshape(2, 128)
    fi_ffi.xqa(**{**batch.arrays, "output": output}, **scales)
    exact = batch.values[pages, 0].astype(float).repeat(4, axis=1) * 0.5 * 3.3
    assert (np.abs(exact) > 448).any()
    assert (output[:, 0] == np.clip(exact, -448, 448).astype(FP8)).all()


@pytest.mark.parametrize("sm_count", [None, 1, 132, 10**6])
def test_a_semaphore_for_each_request_and_head(sm_count, rng):
    options = {"semaphores": np.zeros(4 * 2, np.uint32), "sm_count": sm_count}
    assert Batch(Spec(options=options), rng).check(HostArray) <= 1


def test_a_grid_has_room_for_so_many(monkeypatch, rng):
    """Requests, and heads of the keys; on Hopper with fp8 keys, their product."""
    monkeypatch.setattr(machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 132)

    def told(requests: int, heads: int, keys: str, less: int = 0) -> str:
        shapes = {
            "q": (requests, 1, 2 * heads, 128), "k_cache": (9, 16, heads, 128),
            "v_cache": (9, 16, heads, 128), "page_table": (requests, 2),
            "seq_lens": (requests, 1), "output": (requests, 1, 2 * heads, 128),
            "semaphores": (requests * heads - less,), "workspace_buffer": (1 << 24,),
        }  # fmt: skip
        dtypes = {
            "k_cache": keys, "v_cache": keys, "page_table": "int32", "seq_lens": "uint32",
            "semaphores": "uint32", "workspace_buffer": "uint8",
        }  # fmt: skip
        descs = {
            name: fi_ffi.TensorDesc(i << 40, shape, dtypes.get(name, "bfloat16"), device="cuda:0")
            for i, (name, shape) in enumerate(shapes.items(), 1)
        }
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            fi_ffi.xqa(**descs, stream=0)
        return str(caught.value)

    assert "b = 65536 of at most 65535" in told(2**16, 1, "bfloat16")
    assert "num_kv_heads = 65536 of at most 65535" in told(1, 2**16, "bfloat16")
    assert "b * num_kv_heads of at most 65535" in told(2**14, 4, "float8_e4m3fn")
    # One semaphore too few, and nothing else.
    assert f"{4 * 2**16} bytes or more" in told(2**14, 4, "bfloat16", 1)


def test_the_judge_sees_a_wrong_result(rng):
    batch = Batch(SPECS["plain"], rng)
    right = batch.expected()
    assert batch.check(HostArray) <= 1
    batch.spec, batch.expected = replace(batch.spec, options={"q_scale": 1.3}), lambda: right
    assert batch.check(HostArray) > 1


@pytest.mark.parametrize(("release", "window", "words"), [
    ("0.6.15", 20, "the kernels of FlashInfer 0.6.15 hide only whole tiles"),
    ("0.6.13", 47, "0, or 48 or more"), ("0.6.13", 48, ""), ("0.6.16", 20, ""),
])  # fmt: skip
def test_windows_of_several_queries(release, window, words, rng, monkeypatch):
    """The pages hold 3 * 16 keys."""
    module = sys.modules[fi_ffi.xqa.__module__]
    monkeypatch.setattr(module, "release_for", lambda device: release)
    batch = Batch(Spec(queries=4, lengths=(4, 30), window=window), rng)
    if words:
        given = {"sliding_win_size": window}
        refused(fi_ffi.xqa, batch.arrays, "sliding_win_size", words, **given)
    else:
        assert batch.check(HostArray) <= 1


def _wrong_drafts() -> dict[str, tuple[dict[str, object], str, str]]:
    mask = np.ones((2, 4, 2), np.uint16)
    sinks = np.zeros((2, 3), np.float32)
    return {
        "no mask": ({"mask": None}, "mask", "which keys each of them sees"),
        "words of a mask": ({"mask": mask[..., :1]}, "mask", "(2, 4, 2)"),
        "bytes of a mask": ({"mask": mask.astype(np.uint8)}, "mask", "uint16"),
        "a mask at an odd address": (
            {"mask": np.zeros(17, np.uint16)[1:].reshape(2, 4, 2)}, "mask", "4 bytes"),
        "an output of one query": (
            {"output": np.zeros((2, 1, 8, 128), BF16)}, "output", "rank 5"),
        "one query": ({"q": np.zeros((2, 1, 1, 8, 128), BF16)}, "q", "one in rank 4"),
        "sinks of heads that rows split": (
            {"q": np.zeros((2, 1, 12, 6, 128), BF16), "mask": np.ones((2, 12, 2), np.uint16),
             "sinks": sinks}, "sinks", "begin at different heads"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _wrong_drafts())
def test_refusals_of_several_queries(name, rng):
    given, argument, words = _wrong_drafts()[name]
    batch = Batch(Spec(queries=4, lengths=(4, 30)), rng)
    refused(fi_ffi.xqa, batch.arrays, argument, words, **given)


def test_one_query_has_no_mask(rng):
    batch = Batch(SPECS["plain"], rng)
    with pytest.raises(fi_ffi.ArgumentError, match="None with one query"):
        fi_ffi.xqa(**batch.arrays, mask=np.ones((4, 1, 2), np.uint16))


def test_many_queries_need_more_semaphores(rng):
    """A counter for each block of 32 rows, of queries and the heads that share their keys."""
    spec = Spec(queries=9, lengths=(9, 30), options={"semaphores": np.zeros(2 * 2 * 2, np.uint32)})
    assert Batch(spec, rng).check(HostArray) <= 1
    few = replace(spec, options={"semaphores": np.zeros(2 * 2 * 2 - 1, np.uint32)})
    with pytest.raises(fi_ffi.ArgumentError, match="32 bytes or more"):
        Batch(few, rng).check(HostArray)


def _wrong() -> dict[str, tuple[str, object, str]]:
    f32 = np.float32
    return {
        "rank of q": ("q", np.zeros((4, 8, 128), BF16), "rank 4"),
        "two beams": ("q", np.zeros((4, 2, 8, 128), BF16), "rank 4"),
        "heads of q": ("q", np.zeros((4, 1, 7, 128), BF16), "a multiple of the cache's 2"),
        "q in float32": ("q", np.zeros((4, 1, 8, 128), f32), "float16 or bfloat16"),
        "head size of q": ("q", np.zeros((4, 1, 8, 64), BF16), "head_dim = 128"),
        "requests of q": ("q", np.zeros((3, 1, 8, 128), BF16), "b = "),
        "output in float16": ("output", np.zeros((4, 1, 8, 128), F16), "bfloat16"),
        "rank of keys": ("k_cache", np.zeros((9, 16, 256), BF16), "rank 4"),
        "no heads": ("k_cache", np.zeros((9, 16, 0, 128), BF16), "at least 1"),
        "a page of 8": ("k_cache", np.zeros((9, 8, 2, 128), BF16), "page_size of 16"),
        "values of another size": ("v_cache", np.zeros((9, 16, 4, 128), BF16), "num_pages"),
        "keys in float32": ("k_cache", np.zeros((9, 16, 2, 128), f32), "as q"),
        "lengths of int64": ("seq_lens", np.zeros((4, 1), np.int64), "uint32"),
        "rank of lengths": ("seq_lens", np.zeros(4, np.uint32), "rank 2"),
        "rank of the table": ("page_table", np.zeros(4, np.int32), "rank 2"),
        "table of int64": ("page_table", np.zeros((4, 9), np.int64), "int32"),
        "window": ("sliding_win_size", -1, "from 0"),
        "window in words": ("sliding_win_size", "all", "int"),
        "layout": ("kv_layout", "HDN", "NHD"),
        "scale": ("q_scale", float("nan"), "finite"),
        "scale of two": ("q_scale", np.ones(2, f32), "1"),
        "sinks": ("sinks", np.zeros((4, 2), f32), "num_kv_heads = 2"),
        "sinks in float16": ("sinks", np.zeros((2, 4), F16), "float32"),
        "multiprocessors": ("sm_count", 0, "from 1"),
        "semaphores of int32": ("semaphores", np.zeros(8, np.int32), "uint32"),
        "a semaphore too few": ("semaphores", np.zeros(7, np.uint32), "32 bytes or more"),
        "workspace": ("workspace_buffer", np.zeros(100, np.uint8), "bytes or more"),
        "text": ("q", "queries", "Tensor"),
        "none": ("k_cache", None, "Tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _wrong())
def test_refusals(name, rng):
    argument, value, words = _wrong()[name]
    batch = Batch(SPECS["plain"], rng)
    given = {argument: value} | ({"v_cache": value} if name == "a page of 8" else {})
    sizes = ("head size of q", "requests of q", "values of another size")
    refused(fi_ffi.xqa, batch.arrays, "" if name in sizes else argument, words, **given)


def test_strides_that_are_no_heads(rng):
    batch = Batch(SPECS["plain"], rng)
    wide = np.zeros((*batch.keys.shape[:3], 136), BF16)[..., :128]
    with pytest.raises(fi_ffi.ArgumentError, match="multiples of 128"):
        fi_ffi.xqa(**(batch.arrays | {"k_cache": wide}))
    together = np.zeros((len(batch.keys), 2, *batch.keys.shape[1:]), BF16)
    together[:, 0], together[:, 1] = batch.keys, batch.values
    arrays = batch.arrays | {"k_cache": together[:, 0], "v_cache": together[:, 1]}
    fi_ffi.xqa(**arrays)
    alone = {**batch.arrays, "output": np.full_like(batch.arrays["output"], np.nan)}
    fi_ffi.xqa(**alone)
    assert arrays["output"].tobytes() == alone["output"].tobytes()
    with pytest.raises(fi_ffi.ArgumentError, match="those of `k_cache`"):
        fi_ffi.xqa(**(arrays | {"v_cache": batch.values}))


def test_a_gpu_that_is_too_old(monkeypatch, rng):
    monkeypatch.setattr(machine, "capability", lambda index: (8, 7))
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 16)
    descs = {
        name: fi_ffi.TensorDesc(i << 24, array.shape, array.dtype, device="cuda:0")
        for i, (name, array) in enumerate(Batch(SPECS["plain"], rng).arrays.items(), 1)
    }
    scratch = fi_ffi.TensorDesc(1 << 30, (1 << 20,), "uint8")
    counters = fi_ffi.TensorDesc(1 << 31, (1 << 20,), "uint32")
    with pytest.raises(fi_ffi.ArchitectureError, match="8.7"):
        fi_ffi.xqa(**descs, workspace_buffer=scratch, semaphores=counters, stream=0)
