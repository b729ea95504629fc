"""What a batch takes at most, told from a few numbers: never less than what it takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.ops.attention import sizes

LENGTHS = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 5000))
GEOMETRIES = st.builds(
    lambda kv_heads, group, head_dim, page_size, sms, major, unsplit, by_query: sizes.Geometry(
        kv_heads * group, kv_heads, head_dim, page_size, sms, major, disable_split_kv=unsplit,
        by_query=by_query,
    ),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 8]), st.sampled_from([64, 128, 256]),
    st.sampled_from([1, 16, 64]), st.sampled_from([1, 16, 132]), st.sampled_from([8, 9]),
    st.booleans(), st.booleans(),
)  # fmt: skip


def is_within(need: sizes.Need, most: sizes.Need) -> bool:
    return need.float_bytes <= most.float_bytes and need.int_bytes <= most.int_bytes


@settings(max_examples=1000, deadline=None)
@given(g=GEOMETRIES, lens=st.lists(LENGTHS, min_size=1, max_size=40))
def test_prefill(g, lens):
    for backend, exact in (("fa2", sizes.prefill_fa2), ("fa3", sizes.prefill_fa3)):
        most = sizes.prefill_most(g, backend, len(lens), sum(lens))
        assert is_within(exact(g, lens, lens, sum(lens)), most)


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


def test_decode_of_requests_that_fill_the_gpu():
    geometry = sizes.Geometry(64, 8, 128, 16, 132, 9)
    assert sizes.decode(geometry, 4096, [3] * 4096).float_bytes == 0
    assert sizes.decode(geometry, 263, [30] * 263).float_bytes > 0


@settings(max_examples=300, deadline=None)
@given(g=GEOMETRIES, pages=st.lists(LENGTHS, min_size=1, max_size=40))
def test_decode(g, pages):
    assert is_within(sizes.decode(g, len(pages), pages), sizes.decode(g, len(pages), None))


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
