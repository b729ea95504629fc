"""Calls on cuda:1 while cuda:0 is current: they run on their tensors' device, and put that back."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 16


@pytest.fixture
def other():
    """A stream of cuda:1, and a copier to it; cuda:0 is current throughout the test."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import DeviceArray, check, gpus

    if len(gpus()) < 2:
        pytest.skip("needs two GPUs")
    made = []

    def copy(host):
        made.append(DeviceArray(host, device=1))
        check(runtime.cudaSetDevice(0))
        return made[-1]

    check(runtime.cudaSetDevice(1))
    stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
    check(runtime.cudaSetDevice(0))
    yield copy, stream
    check(runtime.cudaSetDevice(1))
    check(runtime.cudaStreamSynchronize(stream))
    for array in made:
        array.free()
    check(runtime.cudaStreamDestroy(stream))
    check(runtime.cudaSetDevice(0))


def current() -> int:
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    return check(runtime.cudaGetDevice())


def back(array, stream):
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    assert current() == 0
    check(runtime.cudaStreamSynchronize(stream))
    host = array.get()
    check(runtime.cudaSetDevice(0))
    return host


def attention(q, k, v, causal):
    """One request in float64."""
    out = np.empty(q.shape)
    for head in range(HEADS):
        of = head * KV_HEADS // HEADS
        logits = q[:, head].astype(float) @ k[:, of].astype(float).T * DIM**-0.5
        if causal:
            hidden = np.arange(len(k)) > np.arange(len(q))[:, None] + len(k) - len(q)
            logits[hidden] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, of].astype(float)
    return out


def test_norm_append_prefill_and_decode(other, rng):
    copy, stream = other
    keys, queries = 200, 50
    q = rng.standard_normal((queries, HEADS, DIM)).astype(np.float16)
    k, v = rng.standard_normal((2, keys, KV_HEADS, DIM)).astype(np.float16)
    pages = -(-keys // PAGE)
    indices = rng.permutation(pages + 3)[:pages].astype(np.int32)
    indptr, last = np.array([0, pages], np.int32), np.array([(keys - 1) % PAGE + 1], np.int32)
    cache = copy(np.full((pages + 3, 2, PAGE, KV_HEADS, DIM), np.nan, np.float16)).desc()
    k_cache, v_cache = fi_ffi.split_paged_kv_cache(cache)
    requests, positions = fi_ffi.batch_indices_positions([0, keys], [keys])
    on_device = [copy(array).desc() for array in (k, v, requests, positions)]
    tables = [copy(array).desc() for array in (indices, indptr, last)]
    fi_ffi.append_paged_kv_cache(*on_device, k_cache, v_cache, *tables, stream=stream)
    assert current() == 0

    for backend in ("auto", "fa2"):
        out = copy(np.full_like(q, np.nan))
        plan = fi_ffi.BatchPrefillPlan(
            np.array([0, queries], np.int32), paged_kv_indptr=indptr, paged_kv_indices=indices,
            paged_kv_last_page_len=last, page_size=PAGE, num_qo_heads=HEADS,
            num_kv_heads=KV_HEADS, head_dim_qk=DIM, causal=True, backend=backend,
            device="cuda:1", stream=stream,
        )  # fmt: skip
        assert current() == 0
        plan.paged_run(copy(q).desc(), k_cache, v_cache, out.desc(), stream=stream)
        np.testing.assert_allclose(back(out, stream), attention(q, k, v, True), atol=2e-3)

    out = copy(np.full_like(q[:1], np.nan))
    decode = fi_ffi.BatchDecodePlan(
        indptr, indices, last, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
        page_size=PAGE, device="cuda:1", stream=stream,
    )  # fmt: skip
    decode.run(copy(q[:1]).desc(), k_cache, v_cache, out.desc(), stream=stream)
    np.testing.assert_allclose(back(out, stream), attention(q[:1], k, v, False), atol=2e-3)

    x, weight = q.reshape(-1, DIM), np.ones(DIM, np.float16)
    out = copy(np.full_like(x, np.nan))
    fi_ffi.rmsnorm(out.desc(), copy(x).desc(), copy(weight).desc(), stream=stream)
    root = np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(back(out, stream), x / root, atol=4e-3)


def test_a_plan_of_another_device(other, to_gpu, stream):
    copy, _ = other
    indptr = np.array([0, 4], np.int32)
    plan = fi_ffi.BatchPrefillPlan(
        indptr, kv_indptr=indptr, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM,
        stream=stream,
    )  # fmt: skip
    q, k = np.zeros((4, HEADS, DIM), np.float16), np.zeros((4, KV_HEADS, DIM), np.float16)
    theirs, keys, out = copy(q).desc(), copy(k).desc(), copy(np.full_like(q, np.nan))
    with pytest.raises(fi_ffi.ArgumentError, match="cuda:1.*cuda:0"):
        plan.ragged_run(theirs, keys, keys, out.desc(), stream=stream)
    assert np.isnan(out.get()).all()
    mine = [to_gpu(array).desc() for array in (q, k)]
    with pytest.raises(fi_ffi.ArgumentError, match="cuda:1"):
        plan.ragged_run(mine[0], mine[1], mine[1], out.desc(), stream=stream)


def test_prepared_and_repeated_calls(other, to_gpu, stream, rng):
    """Calls of both devices in turns; cuda:0 is current before and after each."""
    copy, there = other
    hosts = [rng.standard_normal((5, DIM)).astype(np.float16) for _ in range(2)]
    weight = np.ones(DIM, np.float16)

    def right(x):
        return x / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + 1e-6)

    def arguments(place):
        arrays = [(place(np.full_like(x, np.nan)), place(x), place(weight)) for x in hosts]
        return arrays, [[array.desc() for array in each] for each in arrays]

    here, on_here = arguments(to_gpu)
    away, on_away = arguments(copy)
    settle_all()
    calls = [
        fi_ffi.rmsnorm.prepare(*on_here[0], stream=stream),
        fi_ffi.rmsnorm.prepare(*on_away[0], stream=there),
    ]
    loose = [fi_ffi.rmsnorm.prepare(*on_here[0]), fi_ffi.rmsnorm.prepare(*on_away[0])]
    for _ in range(3):  # prepared, by the stream that they were prepared for
        for call in calls:
            call()
            assert current() == 0
    for call, descs in zip(calls, (on_here, on_away), strict=True):
        call.update(*(desc.ptr for desc in descs[1]))
        call()
        assert current() == 0
    check_both(here, away, hosts, right)

    for i, (mine, descs, handle) in enumerate(
        zip(loose, (on_here, on_away), (stream, there), strict=True)
    ):
        with fi_ffi.stream(handle):  # in scopes
            mine()
            mine.update(*descs[1])
            mine()
            fi_ffi.rmsnorm(*descs[0])
            assert current() == 0
            with pytest.raises(fi_ffi.ArgumentError, match=f"in use on cuda:{i}"):
                loose[1 - i]()
    check_both(here, away, hosts, right)

    for _ in range(3):  # typed, the quick way by now
        for descs, handle in ((on_here, stream), (on_away, there)):
            for each in descs:
                fi_ffi.rmsnorm(*each, stream=handle)
                assert current() == 0
    check_both(here, away, hosts, right)


def settle_all():
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    for index in (1, 0):
        check(runtime.cudaSetDevice(index))
        check(runtime.cudaDeviceSynchronize())


def check_both(here, away, hosts, right):
    """Every result on both devices; all of them are poison again after."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import POISON, check

    settle_all()
    for index, sets in ((1, away), (0, here)):
        check(runtime.cudaSetDevice(index))
        for (out, *_), x in zip(sets, hosts, strict=True):
            np.testing.assert_allclose(out.get(), right(x), atol=4e-3)
            check(runtime.cudaMemset(out.ptr, POISON, out.nbytes))
    settle_all()
