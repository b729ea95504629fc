"""Kernels that have no row: fp4, top-k, a stream, and what is no kernel at all."""

from __future__ import annotations

import ctypes
import re
import time

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check
from fi_ffi.ops.moe.lora import on_default_stream

from tests.helpers.untyped_calls import (
    BF16,
    E4M3,
    call,
    float64,
    judged,
    module,
    poisoned,
    swizzled,
    unpacked,
    worst,
)


@pytest.mark.parametrize("linear", [False, True], ids=["swizzled", "linear"])
def test_fp4_to_float_on_the_host(linear, rng):
    found = module("fp4_quantization_90")
    rows, columns = 130, 96
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    values = unpacked(packed)
    for kind, group in ((1, 16), (0, 32)):
        codes = (64, 127) if kind else (100, 150)  # finite
        scales = rng.integers(*codes, (rows, columns // group), dtype=np.uint8)
        factor = rng.uniform(0.5, 2, 1).astype(np.float32) if kind else None
        wide = float64(scales.view(E4M3)) * factor if kind else 2.0 ** (float64(scales) - 127)
        expected = values * np.repeat(wide, group, axis=1)
        stored = scales.reshape(-1) if linear else swizzled(scales)
        out = poisoned((rows, columns), np.float32)
        call(found.e2m1_and_ufp8sf_scale_to_float_sm100, packed, stored, factor, out, group, kind,
             not linear, stream=None)  # fmt: skip
        assert worst(out, expected, 2.0**-22 * np.abs(expected) + 1e-30) <= 1
    out = poisoned((rows, columns), np.float32)
    found.mxfp4_dequantize_host(packed, scales, out, 32)
    assert (out == expected).all()


@pytest.mark.parametrize("name", ["fp4_quantize", "fp4_batched_quantize", "nvfp4", "silu_and_mul"])
def test_fp4_quantization_does_nothing_here(name, rng, to_gpu, stream):
    """Below SM100 these kernels are empty, and the release does not say so."""
    found = module("fp4_quantization_90")
    m, k = 128, 256
    x = to_gpu(rng.standard_normal((m, k)).astype(BF16))
    one, out = to_gpu(np.ones(1, np.float32)), to_gpu(poisoned((m, k // 2), np.uint8))
    scales = to_gpu(poisoned((m, k // 16), np.uint8))
    if name == "fp4_quantize":
        call(found.fp4_quantize, x, one, out, scales, 16, False, True, False, False, False,
             stream=stream)  # fmt: skip
    elif name == "fp4_batched_quantize":
        x3 = to_gpu(x.host[None])
        call(found.fp4_batched_quantize, x3, one, out, scales, 16, False, stream=stream)
    elif name == "nvfp4":
        each = to_gpu(poisoned((m,), np.float32))
        call(found.nvfp4_quant_and_per_token_scale, x, 1 / 2688, out, scales, each, None, 0,
             stream=stream)  # fmt: skip
        # The largest of each row is right; the numbers are all zero.
        expected = np.abs(float64(x.host)).max(1) / 2688
        judged(each, expected, 2.0**-20 * expected)
        assert not out.get().any()
        pytest.xfail("nothing is quantised below SM100, and no error is raised")
    else:
        count = to_gpu(np.array([m], np.int32))
        words = to_gpu(poisoned((m, k // 64), np.int32))
        call(found.silu_and_mul_scaled_nvfp4_experts_quantize, out, words, x, one, count, False,
             stream=stream)  # fmt: skip
        scales = words
    untouched = [(array.get().view(np.uint8) == 0xFF).all() for array in (out, scales)]
    assert all(untouched), "the kernel writes something: hold it to a formula"
    pytest.xfail("nothing is quantised below SM100, and no error is raised")


def test_can_implement_filtered_topk():
    found = module("topk")
    kind = runtime.cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerMultiprocessor
    shared = check(runtime.cudaDeviceGetAttribute(kind, 0))
    assert found.can_implement_filtered_topk(device="cuda:0") is (shared >= 128 * 1024)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
@pytest.mark.parametrize("clusters", [1, 8])
@pytest.mark.parametrize("way", ["plain", "page_table", "ragged"])
def test_fast_topk_clusters(dtype, clusters, way, rng, to_gpu, stream):
    """The largest of each row, in any order; of equal ones any."""
    found, rows, longest, top_k = module("topk"), 5, 16384, 512
    x = rng.standard_normal((rows, longest)).astype(dtype)
    lengths = np.array([longest, 9000, 700, 512, 100], np.int32)
    overflow = to_gpu(poisoned((rows, 4 * longest), np.int32))
    indices = to_gpu(poisoned((rows, top_k), np.int32) - 5)
    logits, numbers = to_gpu(x), (top_k, 4096, clusters, False)
    if way == "plain":
        lengths[:] = longest
        values = to_gpu(poisoned((rows, top_k), dtype))
        call(found.fast_topk_clusters_exact, logits, indices, values, None, overflow, *numbers,
             stream=stream)  # fmt: skip
        own = indices.get()
        picked = np.take_along_axis(x, own.astype(np.int64), axis=1)
        assert (float64(values.get()) == float64(picked)).all()
    elif way == "page_table":
        table = rng.permutation(rows * longest).reshape(rows, longest).astype(np.int32)
        entry = found.fast_topk_clusters_exact_page_table_transform
        call(entry, logits, indices, to_gpu(lengths), to_gpu(table), None, overflow, *numbers,
             stream=stream)  # fmt: skip
        got, back = indices.get(), np.argsort(table.reshape(-1))
        own = np.where(got < 0, -1, back[got] - np.arange(rows)[:, None] * longest)
    else:
        offsets = rng.integers(0, 10**6, rows).astype(np.int32)
        entry = found.fast_topk_clusters_exact_ragged_transform
        call(entry, logits, indices, to_gpu(lengths), to_gpu(offsets), None, overflow, *numbers,
             stream=stream)  # fmt: skip
        got = indices.get()
        own = np.where(got < 0, -1, got - offsets[:, None])
    for row, length in enumerate(lengths):
        mine = own[row][own[row] != -1]
        assert len(mine) == len(set(mine)) == min(top_k, length)
        assert ((mine >= 0) & (mine < length)).all()
        assert (np.sort(float64(x[row, mine])) == np.sort(float64(x[row, :length]))[-top_k:]).all()
    assert indices.intact()


def test_delay_kernel(stream):
    """It waits on the call's stream, and not before the call returns."""
    entry = module("trtllm_utils").delay_kernel
    took = []
    for microseconds in (1, 20000, 100000):  # the first one loads the kernel
        check(runtime.cudaDeviceSynchronize())
        begin = time.perf_counter()
        entry(microseconds, device="cuda:0", stream=stream)
        returned = time.perf_counter() - begin
        busy = runtime.cudaStreamQuery(stream)[0] != runtime.cudaError_t.cudaSuccess
        check(runtime.cudaStreamSynchronize(stream))
        took.append(time.perf_counter() - begin)
    assert busy and returned < took[2] / 2
    # Each step sleeps for up to twice a microsecond, and a little for the loop.
    assert 0.02 < took[2] < 1 and took[2] > 3 * took[1]


def printed(capfd):
    """What C's printf has written: to a file it is kept until it is flushed."""
    ctypes.CDLL(None).fflush(None)
    return capfd.readouterr().out


def test_spdlog(capfd):
    found = module("spdlog")
    try:
        found.set_log_level(2)
        found.try_log_info("braces {} and words")
        said = printed(capfd)
        assert re.search(r"\[flashinfer\] \[.*info.*\] braces \{\} and words\n", said), said
        found.set_log_level(4)  # errors
        found.try_log_info("not this")
        assert printed(capfd) == ""
        with pytest.raises(fi_ffi.ArgumentTypeError):
            found.try_log_info(b"bytes")
    finally:
        found.set_log_level(2)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BF16, np.int32, np.int64, np.uint8], ids=str
)
def test_api_log_print_tensor_stats(dtype, rng, to_gpu, stream, capfd):
    entry = module("api_log_stats").api_log_print_tensor_stats
    x = rng.uniform(0, 100, (33, 71)).astype(dtype)
    bad = np.dtype(dtype).kind not in "iu"
    if bad:
        x[1, :3], x[2, :2], x[3, 0] = np.nan, np.inf, -np.inf
    number = int(rng.integers(1 << 40))
    array = to_gpu(x)
    printed(capfd)
    call(entry, array, number, stream=stream)
    array.get()
    said = printed(capfd)
    found = re.search(
        r"id=(\d+) numel=(\d+) min=(\S+) max=(\S+) mean=(\S+) nan=(\d+) inf=(\d+)", said
    )
    assert found, said
    wide = float64(x)
    finite = wide[np.isfinite(wide)]
    seen = wide[~np.isnan(wide)]
    expected = [number, x.size, seen.min(), seen.max(), finite.mean(), 3 * bad, 3 * bad]
    got = [float(text) for text in found.groups()]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-6)


def test_api_log_of_other_dtypes_says_nothing(to_gpu, stream, capfd):
    array = to_gpu(np.zeros(8, E4M3))
    printed(capfd)
    call(module("api_log_stats").api_log_print_tensor_stats, array, 1, stream=stream)
    array.get()
    assert printed(capfd) == ""


def test_the_stream_of_bgmv_moe(rng, to_gpu, stream):
    """Its kernels take no stream before 0.7.2.post1: they run while the stream of the call is busy.

    Who calls them orders them by hand, or calls them on stream 0. Later they wait for the stream.
    """
    wait, found = module("trtllm_utils").delay_kernel, module("bgmv_moe")
    wait(1, device="cuda:0", stream=stream)
    x, weights = (rng.standard_normal((8, 768)).astype(BF16) for _ in "xw")
    out, ids = to_gpu(np.zeros((1, 1, 8), BF16)), [to_gpu(np.zeros(1, np.int64)) for _ in range(3)]
    pointers = to_gpu(np.array([[to_gpu(weights).ptr]]))
    args = out, to_gpu(x[:1]), pointers, *ids, weights.size
    call(found.bgmv_moe_shrink, *args, stream=stream)  # loads the kernel
    once = float64(out.get())
    wait(200000, device="cuda:0", stream=stream)
    call(found.bgmv_moe_shrink, *args, stream=stream)
    check(runtime.cudaStreamSynchronize(0))
    busy = runtime.cudaStreamQuery(stream)[0] != runtime.cudaError_t.cudaSuccess
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    early = np.empty((1, 1, 8), BF16)
    check(runtime.cudaMemcpy(early.ctypes.data, out.ptr, early.nbytes, kind))
    still = runtime.cudaStreamQuery(stream)[0] != runtime.cudaError_t.cudaSuccess
    assert busy and still
    times = 2 if on_default_stream(fi_ffi.parse_device("cuda:0")) else 1
    assert (float64(early) == times * once).all() and once.any()
