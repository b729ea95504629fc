"""What a batch takes at most, told from a few numbers: never less than what it takes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_ffi
from fi_ffi.loader import machine
from fi_ffi.ops.attention import sizes

from tests.helpers import planners

# Of queries and of pages: none, one, few, and what fills tiles and pieces, or is one off.
EDGES = [edge + off for edge in (16, 64, 128, 192) for off in (-1, 0, 1)]
LENGTHS = st.one_of(
    st.just(0), st.just(1), st.integers(0, 40), st.sampled_from(EDGES), st.integers(0, 5000)
)
BATCHES = st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=40)
GEOMETRIES = st.builds(
    lambda kv_heads, group, head_dim, page_size, sms, major, unsplit, by_query: sizes.Geometry(
        kv_heads * group, kv_heads, head_dim, page_size, sms, major, disable_split_kv=unsplit,
        by_query=by_query,
    ),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 8]), st.sampled_from([64, 128, 256]),
    st.sampled_from([1, 16, 64, 256]), st.sampled_from([1, 16, 132]), st.sampled_from([7, 8, 9]),
    st.booleans(), st.booleans(),
)  # fmt: skip
OPTIONS = st.fixed_dictionaries({
    "window_left": st.sampled_from([-1, -1, 0, 1, 15, 16, 17, 100]),
    "num_colocated_ctas": st.sampled_from([0, 0, 1, 31, 32, 33, 1000]),
})  # fmt: skip


def is_within(need: sizes.Need, most: sizes.Need) -> bool:
    return need.float_bytes <= most.float_bytes and need.int_bytes <= most.int_bytes


def of_a_planner(planned: tuple[int, int, bool]) -> sizes.Need:
    return sizes.Need(*planned)


PREFILLS = {
    "fa2": (planners.prefill_fa2, sizes.prefill_fa2),
    "fa3": (planners.prefill_fa3, sizes.prefill_fa3),
}


def check_prefill(g: sizes.Geometry, queries: list[int], pages: list[int]) -> None:
    """The planner takes what it is said to take, and no more than any such batch at most; nor do
    batches of the same kind that are smaller."""
    rows, size = sum(queries), len(queries)
    of_fewer = [queries[1:], queries[: -(-size // 2)], [n // 2 for n in queries], [rows]]
    for backend, (planner, exact) in PREFILLS.items():
        planned = of_a_planner(planner(g, queries, pages, rows))
        assert exact(g, queries, pages, rows) == planned
        most = sizes.prefill_most(g, backend, size, rows)
        assert is_within(planned, most)
        assert most.split is None or most.split == planned.split
        kind = sizes.prefill_kind(g, backend, size, rows)
        for fewer in filter(None, of_fewer):
            if sizes.prefill_kind(g, backend, len(fewer), sum(fewer)) == kind:
                need = exact(g, fewer, pages[: len(fewer)], sum(fewer))
                assert is_within(need, most)


@settings(max_examples=1000, deadline=None)
@given(g=GEOMETRIES, options=OPTIONS, batch=BATCHES)
def test_prefill(g, options, batch):
    check_prefill(replace(g, **options), *map(list, zip(*batch, strict=True)))


@pytest.mark.parametrize("sms", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_prefill_where_just_as_many_tiles_fit(sms, group):
    """All queries in one request or two, in as many tiles as there are blocks, one less or more;
    beside requests of more or fewer pages, of none and of no queries."""
    for kv_heads, by_query, tile, off in itertools.product(
        (1, 2), (False, True), (16, 64, 128), (-1, 0, 1)
    ):
        g = sizes.Geometry(group * kv_heads, kv_heads, 128, 16, sms, 9, by_query=by_query)
        rows = max(g.most_split + off, 1) * tile // group
        for pages in ([1, 40], [40, 1], [40, 0], [0, 40], [30, 31], [30, 30]):
            for more in ([], [0], [0, 0, 0]):
                for queries in ([rows, 0], [rows - tile, tile], [rows - 1, 1], [rows, 1]):
                    if min(queries) >= 0:
                        check_prefill(g, queries + more, pages + [50] * len(more))


def test_prefill_of_no_queries_where_decodes_take_every_block():
    for taken in (263, 264, 265, 1000):
        g = sizes.Geometry(8, 2, 128, 16, 132, 9, num_colocated_ctas=taken)
        check_prefill(g, [0, 0], [50, 1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fa3_where_its_heads_begin_to_share_a_schedule(head_dim):
    tile = 192 if head_dim == 64 else 128
    for graph, off, requests in itertools.product((False, True), (-1, 0, 1), (1, 3)):
        g = sizes.Geometry(8, 2, head_dim, 16, 132, 9, enable_cuda_graph=graph)
        rows = (4097 - requests) * tile + off
        lens = [rows - requests + 1] + [1] * (requests - 1)
        planned = of_a_planner(planners.prefill_fa3(g, lens, lens, rows))
        assert sizes.prefill_fa3(g, lens, lens, rows) == planned


@settings(max_examples=300, deadline=None)
@given(
    g=GEOMETRIES, options=OPTIONS, batch=BATCHES, room=st.sampled_from([0, 0, 1, 15, 16, 1000]),
    each=LENGTHS.filter(bool), is_uniform=st.booleans(),
)  # fmt: skip
def test_prefill_with_cuda_graphs(g, options, batch, room, each, is_uniform):
    """Of as many queries as are reserved."""
    queries, pages = map(list, zip(*batch, strict=True))
    if is_uniform:
        queries, options = [each] * len(pages), options | {"uniform_q_len": each}
    g, rows = replace(g, enable_cuda_graph=True, **options), sum(queries) + room
    for planner, exact in PREFILLS.values():
        assert exact(g, queries, pages, rows) == of_a_planner(planner(g, queries, pages, rows))


@settings(max_examples=200, deadline=None)
@given(g=GEOMETRIES, options=OPTIONS, batch=BATCHES, size=st.sampled_from([1, 2, 16, 17, 4999]))
def test_prefill_of_a_fixed_split(g, options, batch, size):
    queries, pages = map(list, zip(*batch, strict=True))
    g, rows = replace(g, fixed_split_size=size, **options), sum(queries)
    planned = of_a_planner(planners.prefill_fa2(g, queries, pages, rows))
    assert sizes.prefill_fa2(g, queries, pages, rows) == planned


# What FlashInfer's planner sets aside: `PrefillPlan` of 0.6.13, compiled for the host, on 132
# multiprocessors.  Options, queries and keys (pages) of each request; bytes, and whether it splits.
_PLANNED = [
    ((32, 4, 128, 16), {}, [100, 3], [4, 9], (19021824, 585, True)),
    ((32, 4, 128, 16), {}, [100, 3], [400, 9], (135266304, 1264, True)),
    ((8, 2, 128, 16), {}, [300, 5], [3000, 700], (64991232, 2859, True)),
    ((8, 2, 128, 16), {"num_colocated_ctas": 200}, [300, 5], [3000, 700], (16379904, 1663, True)),
    ((8, 2, 64, 1), {}, [1] * 20, [5000] * 20, (3993600, 1752, True)),
    ((8, 2, 64, 1), {}, [1], [16896], (4392960, 1748, True)),  # just as many pieces as blocks
    ((8, 2, 64, 1), {"window_left": 100}, [1] * 20, [5000] * 20, (0, 328, False)),
    ((4, 4, 256, 16), {"fixed_split_size": 3}, [40, 2], [100, 1], (9210880, 659, True)),
    ((32, 4, 128, 16), {"enable_cuda_graph": True}, [100, 3], [4, 9], (139493376, 1330, True)),
]


# The same of 0.7.2.post1.
_BY_QUERY = {"by_query": True}
_PLANNED += [
    ((32, 4, 128, 16), _BY_QUERY, [100, 3], [4, 9], (2377728, 576, True)),
    ((32, 4, 128, 16), _BY_QUERY, [100, 3], [400, 9], (16908288, 1200, True)),
    ((8, 2, 128, 16), _BY_QUERY, [300, 5], [3000, 700], (16247808, 2728, True)),
    ((8, 2, 64, 1), _BY_QUERY, [1] * 20, [5000] * 20, (998400, 1620, True)),
    ((8, 2, 64, 1), _BY_QUERY | {"window_left": 100}, [1] * 20, [5000] * 20, (0, 328, False)),
    ((4, 4, 256, 16), _BY_QUERY | {"fixed_split_size": 3}, [40, 2], [100, 1],
     (9210880, 620, True)),
    ((32, 4, 128, 16), _BY_QUERY | {"enable_cuda_graph": True}, [100, 3], [4, 9],
     (17436672, 1330, True)),
    *((heads, _BY_QUERY | {"enable_cuda_graph": True, "uniform_q_len": each}, [each] * len(pages),
       pages, (*planned, True)) for heads, each, pages, planned in (
        ((32, 4, 128, 16), 2, [40, 90, 3, 7], (2179584, 978)),
        ((8, 2, 64, 1), 5, [50] * 200, (6656000, 7448)),
        ((32, 4, 128, 16), 20, [50] * 60, (31703040, 6648)))),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "options", "queries", "pages", "planned"), _PLANNED)
def test_prefill_takes_what_the_planner_does(heads, options, queries, pages, planned):
    geometry = sizes.Geometry(*heads, 132, 9, **options)
    need = sizes.prefill_fa2(geometry, queries, pages, sum(queries))
    assert (need.float_bytes, need.int_bytes, need.split) == planned


def test_a_workspace_that_the_most_does_not_fit():
    """Of 128 MiB, as FlashInfer's wrappers have: what this batch takes, and not what others do."""
    geometry, lens = sizes.Geometry(32, 4, 128, 16, 132, 9), ([100, 3], [4, 9])
    most = sizes.prefill_most(geometry, "fa2", 2, 103)
    exact = sizes.prefill_fa2(geometry, *lens, 103)
    assert exact.float_bytes < 2**27 < most.float_bytes == 139493376


@pytest.mark.parametrize(("head_dim", "tile"), [(64, 192), (128, 128)])
def test_the_most_of_fa3_is_what_some_batch_takes(head_dim, tile):
    """Requests of one row more than fills their tiles, few and many."""
    geometry = sizes.Geometry(32, 4, head_dim, 16, 132, 9)
    for full in ([0], [2, 0, 1], [3] * 40):
        queries = [tile * n + 1 for n in full]
        rows, size = sum(queries), len(queries)
        planned = of_a_planner(planners.prefill_fa3(geometry, queries, [9] * size, rows))
        assert sizes.prefill_most(geometry, "fa3", size, rows) == planned


def test_decode_of_requests_that_fill_the_gpu():
    geometry = sizes.Geometry(64, 8, 128, 16, 132, 9)
    assert sizes.decode(geometry, 264, [30] * 264).float_bytes == 0
    assert sizes.decode(geometry, 263, [30] * 263).float_bytes > 0


@settings(max_examples=300, deadline=None)
@given(
    g=GEOMETRIES, pages=st.lists(LENGTHS, min_size=1, max_size=40), is_graph=st.booleans(),
    blocks=st.sampled_from([1, 2, 3, 8, 16]),
)  # fmt: skip
def test_decode(g, pages, is_graph, blocks):
    """Of any kernel: the GPU has room for 1 to 16 of its blocks on a multiprocessor."""
    g = replace(g, enable_cuda_graph=is_graph)
    planned = of_a_planner(planners.decode(g, pages, blocks))
    need = sizes.decode(g, len(pages), pages)
    assert is_within(planned, need)
    assert is_within(need, sizes.decode(g, len(pages), None))


@pytest.mark.parametrize("is_graph", [False, True])
def test_decode_where_requests_just_fill_the_gpu(is_graph):
    """One long request beside many of few pages or none."""
    for kv_heads, sms, off, short in itertools.product((1, 2), (1, 2), (-1, 0, 1), (0, 1, 8)):
        g = sizes.Geometry(8 * kv_heads, kv_heads, 128, 16, sms, 9, enable_cuda_graph=is_graph)
        for blocks in (1, 2, 15, 16):
            count = max(blocks * sms // kv_heads + off, 1)
            for long in (8, 9, 100, 3000):
                pages = [long] + [short] * (count - 1)
                planned = of_a_planner(planners.decode(g, pages, blocks))
                need = sizes.decode(g, count, pages)
                assert is_within(planned, need)
                assert is_within(need, sizes.decode(g, count, None))


def test_partial_results_have_a_logarithm_each():
    """Of a batch that is split: a float32 for each element of a partial result, and one for each
    of its rows."""
    lens = [300, 5], [3000, 700]
    narrow, wide = (
        sizes.prefill_fa2(sizes.Geometry(8, 2, head_dim, 16, 132, 9), *lens, 305).float_bytes
        for head_dim in (64, 128)
    )
    elements = wide - narrow
    assert elements > 0 and narrow == elements + elements // 64
    of_decode = [
        sizes.decode(sizes.Geometry(8, 2, d, 16, 132, 9), 2, [100, 200]) for d in (64, 128)
    ]
    elements = of_decode[1].float_bytes - of_decode[0].float_bytes
    assert elements > 0 and of_decode[0].float_bytes == elements + elements // 64


KEYS = [0, 1, 255, 256, 257, 511, 512, 513, 3000, 16896, 16897]
HEADS = [(1, 1), (8, 1), (8, 2), (12, 4)]
# By rows of a tile: what registers allow at most.
BLOCKS = {16: 16, 64: 8, 128: 4}


@pytest.mark.parametrize("sms", [1, 3, 132])
def test_what_one_request_takes(sms, monkeypatch):
    """Just what the split takes on a GPU that holds as many blocks as one may; on others, less."""
    monkeypatch.setattr(machine, "multiprocessors", lambda index: sms)
    for keys, heads, head_dim in itertools.product(KEYS, HEADS, (64, 128, 256)):
        group = heads[0] // heads[1]
        need = fi_ffi.single_decode_workspace_size(keys, *heads, head_dim)
        taken = [planners.single(1, keys, heads, head_dim, group, n * sms) for n in range(1, 17)]
        assert need == max(taken), (keys, heads, head_dim)
        for queries in (0, 1, 2, 8, 9, 16, 17, 64, 65, 128, 129):
            need = fi_ffi.single_prefill_workspace_size(queries, keys, *heads, head_dim)
            g = sizes.Geometry(*heads, head_dim, 1, sms, 9)
            tile = planners.tile_of(queries * group, g)
            taken = (
                [0]
                if not queries
                else [
                    planners.single(queries, keys, heads, head_dim, tile, n * sms)
                    for n in range(1, BLOCKS[tile] + 1)
                ]
            )
            assert need == max(taken), (queries, keys, heads, head_dim)


def check_mla(g: sizes.Geometry, queries: list[int], keys: list[int]) -> None:
    taken, (works, merging, rows) = planners.mla(g, queries, keys)
    need = sizes.mla(g, queries)
    assert (need.float_bytes, need.int_bytes) == taken
    assert works <= sizes.mla_works(g, queries)
    assert merging <= g.multiprocessors
    size = sizes.mla_cluster(g, len(queries), sum(queries))
    assert rows <= 2 * (g.multiprocessors // size) * size * 64


@settings(max_examples=500, deadline=None)
@given(
    heads=st.sampled_from([1, 8, 16, 24, 64, 65, 128]), sms=st.sampled_from([2, 3, 16, 131, 132]),
    batch=BATCHES,
)  # fmt: skip
def test_mla(heads, sms, batch):
    check_mla(sizes.Geometry(heads, 1, 512, 1, sms, 9), *map(list, zip(*batch, strict=True)))


@pytest.mark.parametrize("sms", [2, 3, 16, 131])
@pytest.mark.parametrize("heads", [1, 16, 32, 64])
def test_mla_where_requests_just_fill_a_tile(heads, sms):
    """Of as many rows as a tile has, or a query's less or more; and a long request beside short."""
    g = sizes.Geometry(heads, 1, 512, 1, sms, 9)
    each = 64 // heads
    for count, off in itertools.product((1, 4, 20), (-1, 0, 1)):
        queries = [max(each + off, 0)] * count
        for keys in ([1] * count, [5000] + [1] * (count - 1), [5000] + [0] * (count - 1)):
            check_mla(g, queries, keys)
            check_mla(g, [sum(queries)] + [0] * (count - 1), keys)
        wanted = 2 if off == 1 or (each + off) * heads > 64 else 1
        assert sizes.mla_cluster(g, len(queries), sum(queries)) == wanted


@pytest.mark.parametrize("each", [1, 4, 16, 17, 64, 65])
def test_equal_queries_and_one_long_request(each):
    for group, by_query, page_size in itertools.product((1, 4), (False, True), (1, 16)):
        g = sizes.Geometry(2 * group, 2, 128, page_size, 132, 9, by_query=by_query)
        for long, short in itertools.product((9, 700, 20000), (0, 1, 8)):
            check_prefill(g, [each] * 20, [long] + [short] * 19)
