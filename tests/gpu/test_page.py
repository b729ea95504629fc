"""Appending to a paged cache on a GPU: the tests of tests/ops/test_page.py, and the limits."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check
from fi_ffi.loader.runtime import kernel_entry
from fi_ffi.ops.functions import OPS

from tests.helpers.bodies import bodies_of
from tests.helpers.calls import MOST_HEADS, bits, check_append
from tests.helpers.cases import make_case
from tests.ops import test_page

KV = OPS["append_paged_kv_cache"].row

globals().update(bodies_of(test_page))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_many_tokens(kv_layout, rng, to_gpu, stream):
    """More than there are blocks, so that each block has several."""
    sizes = {"nnz": 20011, "b": 33, "page_size": 16, "num_kv_heads": 8, "head_dim": 128}
    case = make_case(KV, sizes, {"T": "float16"}, rng, kv_layout=kv_layout)
    check_append(case, to_gpu, stream, together=True)


@pytest.mark.parametrize(("dtype", "head_dim", "most"), MOST_HEADS)
def test_the_most_heads_and_one_more(dtype, head_dim, most, rng, to_gpu, stream):
    def case(heads: int):
        sizes = {"nnz": 9, "b": 2, "page_size": 4, "num_kv_heads": heads, "head_dim": head_dim}
        return make_case(KV, sizes, {"T": dtype}, rng)

    check_append(case(most), to_gpu, stream)
    with pytest.raises(fi_ffi.ArgumentError, match=f"num_kv_heads of at most {most}"):
        check_append(case(most + 1), to_gpu, stream)
    # The kernel's own word for it.
    descs = [to_gpu(array).desc() for array in case(most + 1).arrays.values()]
    with pytest.raises(fi_ffi.KernelError, match="AppendPagedKVCache failed"):
        kernel_entry(KV.module, KV.signature, KV.releases)(*descs, 0)


@pytest.mark.parametrize(("stride", "wraps"), [(2**32 - 16, False), (2**32, True)])
def test_the_stride_limit_is_where_the_kernel_wraps(stride, wraps, rng, to_gpu, stream):
    """page.cuh keeps strides in 32 bits: with 2**32 every page would be page 0."""
    sizes = {"num_pages": 3, "page_size": 4, "num_kv_heads": 1, "head_dim": 64}
    tables = {
        "batch_indices": np.array([0], np.int32),
        "positions": np.array([1], np.int32),
        "kv_indices": np.array([2], np.int32),
        "kv_indptr": np.array([0, 1], np.int32),
        "kv_last_page_len": np.array([2], np.int32),
    }
    case = make_case(KV, sizes, {"T": "float8_e4m3fn"}, rng, tables)
    names, size = ("paged_k_cache", "paged_v_cache"), 4 * 64
    base = int(check(runtime.cudaMalloc(2 * stride + 2 * size)))
    try:
        where = {name: base + i * size for i, name in enumerate(names)}
        down = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        up = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for name in names:
            for i, page in enumerate(case.arrays[name]):
                source = np.ascontiguousarray(page).ctypes.data
                check(runtime.cudaMemcpy(where[name] + i * stride, source, size, down))
        descs = {n: to_gpu(a).desc() for n, a in case.arrays.items() if n not in names}
        for name in names:
            shape, strides = case.arrays[name].shape, (stride, 64, 64, 1)
            descs[name] = fi_ffi.TensorDesc(where[name], shape, "float8_e4m3fn", strides=strides)
        in_order = [descs[arg.name] for arg in KV.tensors]
        if wraps:
            with pytest.raises(fi_ffi.ArgumentError, match="strides below 4294967296"):
                fi_ffi.append_paged_kv_cache(*in_order, stream=stream)
            kernel_entry(KV.module, KV.signature, KV.releases)(*in_order, 0)
        else:
            fi_ffi.append_paged_kv_cache(*in_order, stream=stream)
        check(runtime.cudaDeviceSynchronize())
        for name in names:
            got, expected = case.arrays[name].copy(), case.expected[name][0]
            for i in range(len(got)):
                check(runtime.cudaMemcpy(got[i].ctypes.data, where[name] + i * stride, size, up))
            assert (bits(got) == bits(expected)).all() == (not wraps)
            if wraps:  # what was to go to page 2 is in page 0
                assert (bits(got[0, 1]) == bits(expected[2, 1])).all()
    finally:
        check(runtime.cudaFree(base))


def test_split_tensors_of_cupy(rng, to_gpu, stream):
    """A cache that cupy owns, split and appended to where it lies."""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    sizes = {"nnz": 20, "b": 3, "page_size": 8, "num_kv_heads": 2, "head_dim": 64}
    case = make_case(KV, sizes, {"T": "float16"}, rng)
    names = ("paged_k_cache", "paged_v_cache")
    whole = cupy.asarray(np.stack([case.arrays[name] for name in names], axis=1))
    cupy.cuda.runtime.deviceSynchronize()
    k, v = fi_ffi.split_paged_kv_cache(whole)
    tensors = [to_gpu(a).desc() for a in case.arrays.values()]
    tensors[4:6] = [k, v]
    fi_ffi.append_paged_kv_cache(*tensors, stream=stream)
    cupy.cuda.runtime.deviceSynchronize()
    expected = np.stack([case.expected[name][0] for name in names], axis=1)
    assert (bits(whole.get()) == bits(expected)).all()
