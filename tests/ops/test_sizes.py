"""What a batch takes at most, told from a few numbers: never less than what it takes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.ops.attention import sizes

LENGTHS = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 5000))
GEOMETRIES = st.builds(
    lambda kv_heads, group, head_dim, page_size, sms, major, disable_split_kv: sizes.Geometry(
        kv_heads * group, kv_heads, head_dim, page_size, sms, major,
        disable_split_kv=disable_split_kv,
    ),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 8]), st.sampled_from([64, 128, 256]),
    st.sampled_from([1, 16, 64]), st.sampled_from([1, 16, 132]), st.sampled_from([8, 9]),
    st.booleans(),
)  # fmt: skip


def is_within(need: sizes.Need, most: sizes.Need) -> bool:
    return need.float_bytes <= most.float_bytes and need.int_bytes <= most.int_bytes


@settings(max_examples=1000, deadline=None)
@given(g=GEOMETRIES, lens=st.lists(LENGTHS, min_size=1, max_size=40))
def test_prefill(g, lens):
    for backend, exact in (("fa2", sizes.prefill_fa2), ("fa3", sizes.prefill_fa3)):
        most = sizes.prefill_most(g, backend, len(lens), sum(lens))
        assert is_within(exact(g, lens, lens, sum(lens)), most)


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
