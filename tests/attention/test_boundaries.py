"""Batches and their places at each threshold: lengths, pages, masks, and rounded capacities."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import FEW, Arrays, Batch
from fi_ffi.ops.plans.rows import query_blocks
from fi_ffi.ops.steps.memory import counting

from tests.helpers.planners import cut, tile_of

MOST = 2**31 - 1
CPU = fi_ffi.parse_device("cpu")
PAGED = {"qo_indptr": "qo", "kv_indptr": "kv", "indices": "pages", "last_page_len": "last"}
OF_LENGTHS = {"kv_indptr": "kv", "kv_len": "lens"}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def paged(queries: int, pages: int, last: int, page_size: int) -> Batch:
    """A request of so many queries and pages, whose numbers runs pass."""
    arrays = ints(0, queries), ints(0, pages), None, ints(last)
    return Batch("plan", PAGED, arrays, page_size)


@pytest.mark.parametrize(
    ("pages", "last", "page_size", "keys"),
    [(0, 0, 16, 0), (1, 1, 16, 1), (1, 16, 16, 16), (2, 1, 16, 17), (3, 16, 16, 48), (7, 1, 1, 7),
     (2**15, 2**16 - 1, 2**16, MOST), (1, MOST, MOST, MOST), (MOST, 1, 1, MOST)],
)  # fmt: skip
def test_keys_of_pages(pages, last, page_size, keys):
    batch = paged(1, pages, last, page_size)
    assert batch.kv_lens == [keys]
    batch.use_kv_len()
    assert list(batch.views["kv_len"]) == [keys]


@pytest.mark.parametrize(
    ("pages", "last", "page_size", "argument"),
    [(1, 0, 16, "last"), (1, 17, 16, "last"), (0, 17, 16, "last"), (0, -1, 16, "last"),
     (1, -1, 16, "last"), (2**15, 2**16, 2**16, "kv"), (2**15 + 1, 1, 2**16, "kv"),
     (2, 1, MOST, "kv")],
)  # fmt: skip
def test_pages_that_are_refused(pages, last, page_size, argument):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        paged(1, pages, last, page_size)
    assert caught.value.argument == argument


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pages", [0, 1, 2, 3])
def test_lengths_fill_their_pages(pages, page_size):
    """Up to the last token of the last page, and from the last of the page before on."""
    for length in range(-1, 3 * page_size + 3):
        arrays = ints(0, pages), ints(length)
        is_right = length >= 0 and (pages - 1) * page_size <= length <= pages * page_size
        if is_right:
            assert Batch("plan", OF_LENGTHS, arrays, page_size).kv_lens == [length]
            continue
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            Batch("plan", OF_LENGTHS, arrays, page_size)
        assert caught.value.argument == "lens"


@pytest.mark.parametrize(
    ("queries", "keys", "nbytes"),
    [(0, 5, 0), (1, 1, 1), (1, 7, 1), (2, 4, 1), (3, 3, 2), (1, 16, 2), (17, 1, 3), (5, 8, 5),
     (2**17, 2**17 - 1, 2**31 - 2**14), (8, MOST, MOST)],
)  # fmt: skip
def test_masks_take_whole_bytes(queries, keys, nbytes):
    arrays = ints(0, queries, queries + 1), ints(0, keys, keys)
    batch = Batch("plan", {"qo_indptr": "qo", "kv_indptr": "kv"}, arrays)
    batch.use_mask()
    assert list(batch.views["mask_indptr"]) == [0, nbytes, nbytes]


@pytest.mark.parametrize(("queries", "keys"), [(2**17, 2**17), (9, MOST), (2**30, 16)])
def test_masks_of_more_bytes_than_int32_counts(queries, keys):
    batch = Batch("plan", {"qo_indptr": "qo", "kv_indptr": "kv"}, (ints(0, queries), ints(0, keys)))
    with pytest.raises(fi_ffi.ArgumentError, match=f"{MOST} bytes at most"):
        batch.use_mask()


@pytest.mark.parametrize(
    ("queries", "keys", "is_right"),
    [(1, 1, True), (2, 1, False), (4, 4, True), (4, 3, False), (4, 5, True), (4, 0, True),
     (0, 0, True), (0, 3, True)],
)  # fmt: skip
def test_no_fewer_keys_than_queries(queries, keys, is_right):
    arrays = ints(0, 1, queries + 1), ints(0, 9, keys + 9)
    batch = Batch("plan", {"qo_indptr": "qo", "kv_indptr": "kv"}, arrays)
    error = None
    try:
        batch.check_keys("here")
    except fi_ffi.ArgumentError as caught:
        error = caught
    assert (error is None) is is_right
    assert is_right or f"{queries} queries and {keys} keys in request 1" in str(error)


def _drawn(rng: np.random.Generator, requests: int, page_size: int) -> dict[str, list[int]]:
    """What a right batch of so many requests has, one of them without pages."""
    pages = rng.integers(1, 7, requests)
    pages[rng.integers(requests)] = 0
    last = np.where(pages, rng.integers(1, page_size + 1, requests), 0)
    lens = np.where(pages, (pages - 1) * page_size + last, 0)
    queries = rng.integers(0, np.where(lens, lens, 3) + 1)
    given = {"pages": pages, "last": last, "lens": lens, "queries": queries}
    return {name: values.tolist() for name, values in given.items()}


def _starts(counts: list[int]) -> np.ndarray:
    return np.array([sum(counts[:i]) for i in range(len(counts) + 1)], np.int32)


@pytest.mark.parametrize("with_numpy", [True, False])
@pytest.mark.parametrize("requests", [1, 2, FEW - 1, FEW, FEW + 1, 3 * FEW])
def test_batches_of_few_requests_and_of_many(requests, with_numpy, rng, monkeypatch):
    """Up to a number of elements Python looks through arrays, from then on numpy if it is there;
    a wrong element of any request is found."""
    page_size = int(rng.integers(1, 17))
    right = _drawn(rng, requests, page_size)
    if not with_numpy:
        monkeypatch.delitem(sys.modules, "numpy")
    batch = Batch("plan", PAGED, (_starts(right["queries"]), _starts(right["pages"]), None,
                                  ints(*right["last"])), page_size)  # fmt: skip
    assert (batch.qo_lens, batch.kv_lens) == (right["queries"], right["lens"])
    assert batch.kv.counts == right["pages"]
    batch.use_kv_len()
    assert [int(n) for n in batch.views["kv_len"]] == right["lens"]
    batch.check_keys("here")
    lengths = _starts(right["pages"]), ints(*right["lens"])
    assert Batch("plan", OF_LENGTHS, lengths, page_size).kv_lens == right["lens"]
    for at in {right["pages"].index(0), int(rng.integers(requests))}:
        pages = right["pages"][at]
        for wrong in (pages * page_size + 1, (pages - 1) * page_size - 1, -1, -(2**31), MOST):
            lens = [wrong if i == at else n for i, n in enumerate(right["lens"])]
            with pytest.raises(fi_ffi.ArgumentError, match=f"{wrong} for request {at} with"):
                Batch("plan", OF_LENGTHS, (lengths[0], ints(*lens)), page_size)
    if requests == 1:
        return
    at = int(rng.choice(np.flatnonzero(right["pages"])))
    queries = [right["lens"][at] + 1 if i == at else n for i, n in enumerate(right["queries"])]
    arrays = _starts(queries), _starts(right["pages"]), None, ints(*right["last"])
    with pytest.raises(
        fi_ffi.ArgumentError, match=f"{queries[at]} queries and .* in request {at},"
    ):
        Batch("plan", PAGED, arrays, page_size).check_keys("here")


def a_batch(requests: int, pages: int) -> Batch:
    names = {"kv_indptr": "kv", "indices": "pages"}
    indptr = np.minimum(np.arange(requests + 1), 1).astype(np.int32) * pages
    return Batch("plan", names, (indptr, np.zeros(pages, np.int32)))


@pytest.mark.parametrize(
    ("requests", "pages", "bytes_", "most"),
    [(1, 1, 1, (63, 1024, 4096)), (63, 1024, 4096, (63, 1024, 4096)),
     (64, 1025, 4097, (127, 2048, 8192)), (127, 2049, 8192, (127, 3072, 8192)),
     (128, 0, 8193, (191, 1024, 12288)), (3, 0, 0, (63, 1024, 4096))],
)  # fmt: skip
def test_rounded_capacities(requests, pages, bytes_, most):
    """Positions in 64s, one more of them than requests; pages in 1024s; the kernel's part in pages
    of 4096 bytes.  A batch fits that has as many as that, and no more."""
    placed = Arrays(bytes_, ["kv_indptr", "indices"], requests, pages)
    of_requests, of_pages, of_kernel = most
    assert placed.where("kv_indptr") == (of_kernel, of_requests + 1)
    assert placed.where("indices") == (of_kernel + 4 * (of_requests + 1), of_pages)
    assert placed.end == of_kernel + 4 * (of_requests + 1 + of_pages)
    assert placed.holds(of_kernel, a_batch(of_requests, of_pages))
    assert not placed.holds(of_kernel + 1, a_batch(of_requests, of_pages))
    assert not placed.holds(of_kernel, a_batch(of_requests + 1, of_pages))
    assert not placed.holds(of_kernel, a_batch(of_requests, of_pages + 1))
    without = Batch("plan", {"kv_indptr": "kv"}, (ints(0, 1),))
    assert not placed.holds(of_kernel, without)


@pytest.mark.parametrize(
    ("queries", "group", "blocks"),
    [(1, 32, 1), (1, 33, 2), (2, 16, 1), (2, 17, 2), (3, 11, 2), (4, 8, 1), (5, 8, 2), (31, 1, 1),
     (32, 1, 1), (33, 1, 2), (64, 1, 2), (65, 1, 3)],
)  # fmt: skip
def test_blocks_of_queries(queries, group, blocks):
    assert query_blocks(queries, group) == blocks


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 2048, 2049])
def test_numbers_that_are_counted(count, step):
    desc = counting(CPU, count, step)
    assert desc.shape == (count,)
    found = np.frombuffer(ffi.buffer(ffi.cast("char *", desc.ptr), 4 * count), np.int32)
    assert found.tolist() == [step * i for i in range(count)]


@pytest.mark.parametrize("head_dim", [64, 128, 255, 256, 257])
@pytest.mark.parametrize("major", [7, 8, 9])
def test_rows_of_a_tile(major, head_dim):
    """By rows of queries on average, of a request and one more: what fills a tile, and one more."""
    for rows in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000):
        g = sizes.Geometry(1, 1, head_dim, 16, 4, major, disable_split_kv=True)
        need = sizes.prefill_fa2(g, [rows], [3], rows)
        tiles = cut(rows, tile_of(rows, g))
        ends = [4 * tiles, 4 * tiles, 4 * tiles, 8]
        end = 0
        for each in ends:
            end = 16 * cut(end, 16) + each
        assert need == sizes.Need(0, end + 4, False)


@pytest.mark.parametrize(("heads", "most"), [(1, 64), (2, 32), (16, 4), (63, 1), (64, 1), (65, 0)])
def test_queries_for_which_blocks_work_together(heads, most):
    """Of more than 64 rows on average: two blocks."""
    g = sizes.Geometry(heads, 1, 512, 1, 132, 9)
    for queries in (1, most, most + 1, 2 * most, 2 * most + 1, 200):
        assert sizes.mla_cluster(g, 1, queries) == (1 if queries <= most else 2)
        is_more = queries * heads >= 2 * 65
        assert sizes.mla_cluster(g, 2, queries) == (2 if is_more else 1)


@pytest.mark.parametrize(
    ("kv_heads", "sms", "requests", "is_split"),
    [(1, 1, 15, None), (1, 1, 16, False), (1, 1, 17, False), (2, 1, 7, None), (2, 1, 8, False),
     (3, 1, 5, None), (3, 1, 6, False), (8, 132, 263, None), (8, 132, 264, False)],
)  # fmt: skip
def test_requests_that_fill_a_gpu(kv_heads, sms, requests, is_split):
    """16 blocks on each multiprocessor, one for each head of a request's keys."""
    need = sizes.decode(
        sizes.Geometry(kv_heads, kv_heads, 64, 16, sms, 9), requests, [1] * requests
    )
    assert need.split is is_split
    if is_split is False:
        end = 0
        for count in (requests, requests, requests + 1):
            end = 16 * cut(end, 16) + 4 * count
        assert (need.float_bytes, need.int_bytes) == (0, end + 4)


@pytest.mark.parametrize(
    ("count", "alignment", "expected"),
    [(0, 16, 0), (1, 16, 16), (15, 16, 16), (16, 16, 16), (17, 16, 32), (2**31 - 1, 4096, 2**31),
     (2**40 + 1, 65536, 2**40 + 65536)],
)  # fmt: skip
def test_sizes_rounded_up(count, alignment, expected):
    assert sizes.aligned(count, alignment) == expected
