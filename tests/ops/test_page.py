"""Appending to a paged cache, bit for bit: on the CPU, and where a test takes a `machine`, on a
GPU as well (tests/gpu/test_page.py).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.notation import parse_axis

from tests.helpers.calls import (
    CALLS_PAGE,
    MOST_HEADS,
    HostArray,
    at_the_end_of_uint32,
    bits,
    check_append,
    edges,
    padded,
)
from tests.helpers.cases import make_case
from tests.helpers.inputs.page import page_tables

KV, MLA = OPS["append_paged_kv_cache"].row, OPS["append_paged_mla_kv_cache"].row
SIZES = {
    "nnz": 23, "b": 4, "page_size": 5, "num_kv_heads": 2, "head_dim": 64,
    "head_dim_ckv": 512, "head_dim_kpe": 64,
}  # fmt: skip
PAGE_SIZES = (1, 3, 16, 64)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_an_example_by_hand(kv_layout):
    """Request 0 has pages 3 and 1 of 2 tokens each, request 1 has page 0; page 2 is free."""
    new = np.arange(1, 4, dtype=np.float16)[:, None, None] * np.ones((3, 2, 64), np.float16)
    shape = (4, 2, 2, 64)
    k, v = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    tables = (ints(3, 1, 0), ints(0, 2, 3), ints(2, 1))
    # Token 3 of request 0, token 0 of request 1, token 0 of request 0.
    fi_ffi.append_paged_kv_cache(
        new, -new, ints(0, 1, 0), ints(3, 0, 0), k, v, *tables, kv_layout=kv_layout
    )
    entries = k[:, :, 0, 0] if kv_layout == "NHD" else k[:, 0, :, 0]
    assert entries.tolist() == [[2, 0], [0, 1], [0, 0], [3, 0]]
    assert (v == -k).all()
    filled = k.any(axis=-1)
    assert filled.sum() == 6
    assert (k[filled] == k[filled][:, :1]).all()


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", KV.dtypes["T"])
def test_heads_and_head_dims(dtype, kv_layout, page_size, together, machine, rng):
    every = [*itertools.product((1, 4, 8), (64, 128, 256, 512))]
    for heads, head_dim in every if machine.is_gpu else rng.permutation(every)[:4].tolist():
        sizes = SIZES | {"page_size": page_size, "num_kv_heads": heads, "head_dim": head_dim}
        case = make_case(KV, sizes, {"T": dtype}, rng, kv_layout=kv_layout)
        check_append(case, machine.place, machine.stream, together)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", MLA.dtypes["T"])
def test_mla(dtype, page_size, machine, rng):
    for nnz in (1, 37, 1000):
        case = make_case(MLA, SIZES | {"nnz": nnz, "page_size": page_size}, {"T": dtype}, rng)
        check_append(case, machine.place, machine.stream)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_empty_requests_and_last_pages(kv_layout, page_size, machine, rng):
    new, before = edges(page_size)
    tables = page_tables(new, before, page_size, rng)
    lengths = fi_ffi.seq_lens(tables["kv_indptr"], tables["kv_last_page_len"], page_size)
    assert lengths.tolist() == [n + b for n, b in zip(new, before, strict=True)]
    assert {1, page_size} <= {*tables["kv_last_page_len"].tolist()}
    # Counts of tokens and requests are those of the tables.
    sizes = {name: size for name, size in SIZES.items() if name not in ("nnz", "b")}
    sizes |= {"page_size": page_size, "num_kv_heads": 4, "head_dim": 128}
    for row, more in ((KV, {"kv_layout": kv_layout}), (MLA, {})):
        case = make_case(row, sizes, {"T": "bfloat16"}, rng, tables, **more)
        check_append(case, machine.place, machine.stream)


@pytest.mark.parametrize(("op", "dtypes"), CALLS_PAGE)
def test_rows_apart(op, dtypes, machine, rng):
    """Tokens and entries 16 elements from each other, which stay as they were."""
    case = make_case(op.row, SIZES | {"nnz": 50, "page_size": 7, "head_dim": 128}, dtypes, rng)
    arrays = {name: padded(a, 16) if a.ndim > 1 else a for name, a in case.arrays.items()}
    check_append(replace(case, arrays=arrays), machine.place, machine.stream)


@pytest.mark.parametrize(("op", "dtypes"), CALLS_PAGE)
def test_as_many_tokens_as_the_kernel_counts(op, dtypes, machine, rng):
    sizes = {"num_pages": 3, "page_size": 1023, "num_kv_heads": 1, "head_dim": 64}
    case = make_case(op.row, SIZES | sizes | {"nnz": 3, "b": 2}, dtypes, rng,
                     at_the_end_of_uint32())  # fmt: skip
    check_append(case, machine.place, machine.stream)


@pytest.mark.parametrize("dtype", KV.dtypes["T"])
def test_every_pattern_of_bits_is_copied(dtype, rng):
    """Every NaN with its payload, and both zeros, whatever the dtype makes of them."""
    itemsize = fi_ffi.DTYPES[dtype].itemsize
    case = make_case(KV, SIZES | {"nnz": 512}, {"T": dtype}, rng)
    key = case.arrays["append_key"]
    every = rng.permutation(key.size) % 256**itemsize
    key[...] = every.astype(f"u{itemsize}").view(key.dtype).reshape(key.shape)
    assert len(np.unique(bits(key))) == 256**itemsize
    fi_ffi.append_paged_kv_cache(**case.arrays)
    pages = case.arrays["kv_indptr"][case.arrays["batch_indices"]] + case.arrays["positions"] // 5
    got = case.arrays["paged_k_cache"][
        case.arrays["kv_indices"][pages], case.arrays["positions"] % 5
    ]
    assert (bits(got) == bits(key)).all()


@pytest.mark.parametrize(("op", "dtypes"), CALLS_PAGE)
def test_no_tokens(op, dtypes, machine, rng):
    """Nothing is read, whatever the addresses and however few pages there are."""
    case = make_case(op.row, SIZES | {"nnz": 0}, dtypes, rng)
    descs = [
        fi_ffi.TensorDesc(4096, a.shape, a.dtype, device=machine.device)
        for a in case.arrays.values()
    ]
    assert op(*descs, **case.scalars, stream=machine.stream) is None
    nothing = {"num_pages": 0, "num_indices": 0, "b": 0, "b+1": 1}
    shapes = [[nothing.get(axis, SIZES.get(axis, 0)) for axis in arg.axis_names if axis != "nnz"]
              for arg in op.row.tensors]  # fmt: skip
    descs = [
        fi_ffi.TensorDesc(
            0, ([0] if "nnz" in arg.axis_names else []) + shape,
            dtypes.get(arg.dtype, arg.dtype), device=machine.device,
        )
        for arg, shape in zip(op.row.tensors, shapes, strict=True)
    ]  # fmt: skip
    assert op(*descs, **case.scalars, stream=machine.stream) is None


def test_the_checks_can_fail(rng):
    """A wrong bit anywhere in a cache, and one beside it, are seen."""
    case = make_case(KV, SIZES, {"T": "float16"}, rng)
    for together in (False, True):
        for name in case.expected:
            value = case.expected[name][0].copy()
            value.view(np.uint16)[tuple(rng.integers(0, value.shape))] ^= 1 << rng.integers(0, 16)
            assert case.error(name, case.expected[name][0]) == (0.0, 0.0)
            assert case.error(name, value)[1] > 1
            wrong = replace(case, expected=case.expected | {name: (value, None)})
            with pytest.raises(AssertionError, match="1 elements are wrong"):
                check_append(wrong, HostArray, None, together)

    class Damaged(HostArray):
        def get(self):
            self.whole[self.guard - 1] = 0
            return super().get()

    with pytest.raises(AssertionError, match="bytes outside"):
        check_append(case, Damaged, None)


WRONG_INDICES = {
    "no such request": ("batch_indices", 4, "is of no request"),
    "before the first request": ("batch_indices", -1, "is of no request"),
    "before the first token": ("positions", -1, "before its start"),
    "past the request's pages": ("positions", 10**6, "past its request's pages"),
    "no such page": ("kv_indices", 10**6, "a page that the cache has not"),
    "a page before the first": ("kv_indices", -1, "a page that the cache has not"),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
@pytest.mark.parametrize("row", [KV, MLA], ids=lambda row: row.name)
def test_the_reference_refuses_wrong_indices(row, wrong, rng):
    """The kernels do not: they would write where the index says."""
    name, value, words = WRONG_INDICES[wrong]
    case = make_case(row, SIZES, {"T": "float16"}, rng)
    case.arrays[name][...] = value
    before = {n: a.tobytes() for n, a in case.arrays.items()}
    with pytest.raises(fi_ffi.KernelError, match=words) as caught:
        OPS[row.name](**case.arrays)
    assert caught.value.kind == "IndexError"
    assert {n: a.tobytes() for n, a in case.arrays.items()} == before


def described(row, dtype: str, **sizes: int) -> dict[str, fi_ffi.TensorDesc]:
    """Tensors of these sizes at addresses that nothing is at, far from each other."""
    sizes = SIZES | {"num_pages": 9, "num_indices": 7} | sizes

    def size(axis: str) -> int:
        return parse_axis(axis).size(sizes)

    return {
        arg.name: fi_ffi.TensorDesc(
            4096 + (i << 50),
            [size(axis) for axis in arg.axis_names],
            dtype if arg.dtype == "T" else arg.dtype,
        )
        for i, arg in enumerate(row.tensors)
    }


def launched(row, **descs: fi_ffi.TensorDesc) -> None:
    """The call passes every check: only the stream is missing."""
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        OPS[row.name](**descs)
    assert caught.value.argument == "stream", caught.value


@pytest.mark.parametrize(("dtype", "head_dim", "most"), MOST_HEADS)
def test_heads_that_a_thread_block_has_no_room_for(dtype, head_dim, most):
    launched(KV, **described(KV, dtype, head_dim=head_dim, num_kv_heads=most))
    descs = described(KV, dtype, head_dim=head_dim, num_kv_heads=most + 1)
    with pytest.raises(fi_ffi.ArgumentError, match=f"num_kv_heads of at most {most}: one thread"):
        fi_ffi.append_paged_kv_cache(**descs)


@pytest.mark.parametrize("row", [KV, MLA], ids=lambda row: row.name)
def test_counts_past_what_the_kernel_counts_in(row):
    last = {"num_indices": 2**32 // 48, "page_size": 48}
    for sizes in (last, {"nnz": 2**31 - 2**10}):
        launched(row, **described(row, "float16", **sizes))
    more = last | {"num_indices": last["num_indices"] + 1}
    with pytest.raises(fi_ffi.ArgumentError, match=r"num_indices \* page_size = \d+ of at most"):
        OPS[row.name](**described(row, "float16", **more))
    with pytest.raises(fi_ffi.ArgumentError, match="nnz = 2147482625 of at most 2147482624"):
        OPS[row.name](**described(row, "float16", nnz=2**31 - 2**10 + 1))


@pytest.mark.parametrize("axis", ["num_pages", "num_indices", "b"])
@pytest.mark.parametrize("row", [KV, MLA], ids=lambda row: row.name)
def test_tokens_with_no_place_to_go(row, axis):
    with pytest.raises(fi_ffi.ArgumentError, match=f"{axis} of at least 1, for nnz = 23"):
        OPS[row.name](**described(row, "float16", **{axis: 0}))


@pytest.mark.parametrize("row", [KV, MLA], ids=lambda row: row.name)
def test_more_elements_than_32_bits_count(row):
    """Strides have a limit; offsets are added up in 64 bits."""
    for sizes in ({"num_pages": 2**31}, {"nnz": 2**30}):
        descs = described(row, "float8_e4m3fn", **sizes)
        assert max(desc.numel for desc in descs.values()) > 2**32
        launched(row, **descs)


@pytest.mark.parametrize(("op", "dtypes"), CALLS_PAGE)
def test_a_cache_that_overlaps_anything_is_refused(op, dtypes, rng):
    """A page of it would be somebody's keys and the step's tables at once."""
    case = make_case(op.row, SIZES, dtypes, rng)
    descs = {name: fi_ffi.as_desc(array) for name, array in case.arrays.items()}
    caches = [arg.name for arg in op.row.tensors if arg.writes]
    before = {name: array.copy() for name, array in case.arrays.items()}
    for cache in caches:
        for name in descs:
            if name == cache:
                continue
            moved = fi_ffi.TensorDesc(
                descs[cache].ptr, descs[name].shape, descs[name].dtype, device="cpu"
            )
            with pytest.raises(fi_ffi.ArgumentError, match="memory that overlaps `"):
                op(**descs | {name: moved}, **case.scalars)
    for name, array in case.arrays.items():
        assert array.tobytes() == before[name].tobytes(), name
    op(**descs, **case.scalars)
    assert all(case.error(out, case.arrays[out])[1] <= 1 for out in case.expected)
