"""The workspace that a plan needs: what the planners of scheduler.cuh allocate.

The sizes of prefill and MLA are exact: prefill's planner searches for the split of requests, and
this module repeats the search. Decode's planner asks CUDA how many of its blocks fit on the GPU,
which is unknown here; decode's sizes are upper bounds for any split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fi_ffi.ops.call.notation import ceil_div

_ALIGNMENT = 16
# The most blocks on a multiprocessor; a decode kernel's block has at least 128 threads.
_DECODE_BLOCKS_PER_SM = 16
# The fixed number of work items that MLA's planner reserves (`max_total_num_works`).
MLA_MAX_WORKS = 16384
# Up to this many tiles, fa3's planner gives each head its own work items.
_FA3_FEW_TILES = 4096
# Releases whose fa2 planner counts partial results by queries.
BY_QUERY = ">=0.7.1"


@dataclass(frozen=True)
class Geometry:
    """The sizes, beside the requests' lengths, that determine a plan's workspace."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_vo: int
    page_size: int
    multiprocessors: int
    major: int
    enable_cuda_graph: bool = False
    window_left: int = -1
    fixed_split_size: int = -1
    disable_split_kv: bool = False
    num_colocated_ctas: int = 0
    uniform_q_len: int = 0
    # Whether fa2 counts partial results by queries, instead of by queries times heads of a group.
    by_query: bool = False

    @cached_property
    def most_split(self) -> int:
        """The most pieces into which fa2's planner splits requests."""
        return max(2 * self.multiprocessors - self.num_colocated_ctas, 0) // self.num_kv_heads

    @cached_property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


class Need(NamedTuple):
    """Bytes of the float and of the int workspace; `split` says whether requests are split (None if
    that depends on their lengths)."""

    float_bytes: int
    int_bytes: int
    split: bool | None = None


def aligned(count: int, alignment: int = _ALIGNMENT) -> int:
    return -(-count // alignment) * alignment


def bytes_of_ints(*counts: int) -> int:
    """Return the bytes of int32 arrays of these lengths, each aligned to 16 bytes."""
    total = 0
    for count in counts:
        total = -(-total // _ALIGNMENT) * _ALIGNMENT + 4 * count
    return total


def partial_bytes(g: Geometry, rows: int, itemsize: int) -> int:
    """Return the bytes of partial outputs, and of a float32 log-sum-exp for each row."""
    return aligned(rows * itemsize * g.head_dim_vo) + 4 * rows


def _cta_tile_q(packed_qo_len: int, geometry: Geometry) -> int:
    """`FA2DetermineCtaTileQ`; the planner passes head_dim_vo."""
    if packed_qo_len > 64 and geometry.head_dim_vo < 256:
        return 128
    return 16 if packed_qo_len <= 16 and geometry.major >= 8 else 64


def prefill_fa2(g: Geometry, qo_lens: Sequence[int], kv_pages: Sequence[int], rows: int) -> Need:
    """`PrefillPlan`; `rows` is the number of queries to reserve for."""
    batch_size = len(qo_lens)
    if g.enable_cuda_graph:
        longest = g.uniform_q_len or (rows - batch_size + 1) & 0xFFFFFFFF
        cta_tile_q = _cta_tile_q(longest * g.group_size, g)
    else:
        cta_tile_q = _cta_tile_q(sum(qo_lens) * g.group_size // batch_size, g)
    seen = [max(n, 1) for n in _seen(g, kv_pages, cta_tile_q)]
    tiles = _tiles(qo_lens, g.group_size, cta_tile_q)
    if g.disable_split_kv:
        chunk = max(seen)
    elif g.fixed_split_size > 0:
        chunk = g.fixed_split_size
    else:
        # With CUDA graphs requests are always split; `padded` bounds the pieces.
        chunk = 0 if g.enable_cuda_graph else _chunk(g, tiles, seen)
    split = chunk < max(seen)
    if g.enable_cuda_graph:
        bound = ceil_div(rows * g.group_size, cta_tile_q) + batch_size - 1
        if g.uniform_q_len:
            bound = batch_size * ceil_div(g.uniform_q_len * g.group_size, cta_tile_q)
        padded = max(g.most_split, bound)
    else:
        padded = _pieces(tiles, seen, chunk)
    return _fa2_need(g, batch_size, rows, padded, cta_tile_q, split)


def _pieces(tiles: Sequence[int], seen: Sequence[int], chunk: int) -> int:
    return sum([a * -(-n // chunk) for a, n in zip(tiles, seen, strict=True)])


def _chunk(g: Geometry, tiles: Sequence[int], seen: Sequence[int]) -> int:
    """`PrefillBinarySearchKVChunkSize`: the smallest piece, in pages, for which all pieces fit into
    one wave of blocks."""
    low, high = max(128 // g.page_size, 1), max(seen)
    while low < high:
        middle = (low + high) // 2
        if _pieces(tiles, seen, middle) > g.most_split:
            low = middle + 1
        else:
            high = middle
    return low


def _fa2_need(
    g: Geometry, batch_size: int, rows: int, padded: int, cta_tile_q: int, split: bool | None
) -> Need:
    int_bytes = bytes_of_ints(padded, padded, padded, batch_size + 1) + 4
    int_bytes = aligned(int_bytes) + 4 if g.enable_cuda_graph else int_bytes
    if split is False:
        # From 0.7.1 on, also a mask of the blocks that have work.
        mask = aligned(int_bytes) - int_bytes + padded if g.enable_cuda_graph else 0
        return Need(0, int_bytes + mask, split)
    int_bytes = aligned(int_bytes) + 4 * (rows + 1)
    if g.enable_cuda_graph or not g.by_query:
        int_bytes = aligned(int_bytes) + padded
    rows_of_pieces = ceil_div(padded * cta_tile_q, g.group_size if g.by_query else 1)
    return Need(partial_bytes(g, g.num_qo_heads * rows_of_pieces, 4), int_bytes, split)


def prefill_most(g: Geometry, backend: str, batch_size: int, rows: int) -> Need:
    """Return the most that any `batch_size` requests with this many queries need, without CUDA
    graphs and without a fixed split. Each request has one tile that is not full."""
    if backend == "fa3":
        tile = _fa3_tile(g)
        return _fa3_need(g, batch_size, rows, rows // tile + batch_size)
    cta_tile_q = _cta_tile_q(rows * g.group_size // batch_size, g)
    tiles = rows * g.group_size // cta_tile_q + batch_size
    split = False if g.disable_split_kv or tiles > g.most_split + batch_size else None
    padded = tiles if split is False else max(g.most_split, tiles)
    return _fa2_need(g, batch_size, rows, padded, cta_tile_q, split)


def prefill_kind(g: Geometry, backend: str, batch_size: int, rows: int) -> int:
    """Return the kind of a batch: of one kind, fewer requests with fewer queries do not need more
    (`prefill_most`). fa2 has tiles of a size, and splits no requests of many tiles; fa3 gives each
    head its own work items unless there are many."""
    if backend == "fa3":
        return _fa3_most_tiles(g, batch_size, rows) > _FA3_FEW_TILES
    packed = rows * g.group_size
    tile = _cta_tile_q(packed // batch_size, g)
    return tile if packed // tile > g.most_split else -tile


def _tiles(qo_lens: Sequence[int], group_size: int, cta_tile_q: int) -> list[int]:
    """Return the tiles of each request's queries; `ceil_div` is inlined because every plan calls
    this."""
    return [-(-n * group_size // cta_tile_q) for n in qo_lens]


def _seen(g: Geometry, kv_pages: Sequence[int], cta_tile_q: int) -> list[int]:
    """Return the pages of each request that any of its queries sees."""
    if g.window_left < 0:
        return list(kv_pages)
    window = ceil_div(g.window_left + cta_tile_q, g.page_size)
    return [min(window, n) for n in kv_pages]


def prefill_fa3(g: Geometry, qo_lens: Sequence[int], kv_pages: Sequence[int], rows: int) -> Need:
    """`PrefillSM90Plan`, which never splits."""
    batch_size, tile = len(qo_lens), _fa3_tile(g)
    if g.enable_cuda_graph:
        tiles = _fa3_most_tiles(g, batch_size, rows)
    else:
        tiles = sum(_tiles(qo_lens, 1, tile))
    return _fa3_need(g, batch_size, rows, tiles)


def _fa3_tile(g: Geometry) -> int:
    return 192 if g.head_dim_vo == 64 else 128


def _fa3_most_tiles(g: Geometry, batch_size: int, rows: int) -> int:
    return ceil_div(rows, _fa3_tile(g)) + batch_size - 1


def _fa3_need(g: Geometry, batch_size: int, rows: int, tiles: int) -> Need:
    are_many = _fa3_most_tiles(g, batch_size, rows) > _FA3_FEW_TILES
    works = tiles * (1 if are_many else g.num_qo_heads)
    return Need(0, bytes_of_ints(*[works] * 6, g.multiprocessors + 1, works), False)


def decode(g: Geometry, batch_size: int, kv_pages: Sequence[int] | None) -> Need:
    """`DecodePlan`, with the most blocks that the GPU could hold.

    Without `kv_pages`, return the most that any requests need.
    """
    blocks = _DECODE_BLOCKS_PER_SM * g.multiprocessors
    if kv_pages is not None and batch_size * g.num_kv_heads >= blocks:
        # The requests alone fill the GPU, so they are not split.
        return Need(0, bytes_of_ints(batch_size, batch_size, batch_size + 1) + 4, False)
    padded = grid = blocks // g.num_kv_heads  # no less than the requests, which fill no GPU
    if kv_pages is None:
        padded += batch_size
    elif not g.enable_cuda_graph:
        least = max(128 // g.page_size, 1)
        # A request without pages is one piece as well.
        pieces = sum([-(-n // least) for n in kv_pages]) + kv_pages.count(0)
        padded = min(grid + batch_size, pieces)
    int_bytes = aligned(bytes_of_ints(padded, padded, padded + 1) + 4) + padded
    return Need(partial_bytes(g, g.num_qo_heads * padded, 4), int_bytes)


def mla_cluster(g: Geometry, batch_size: int, rows: int) -> int:
    """Return the blocks that form a cluster, which determines the grid."""
    return 2 if rows * g.num_qo_heads // batch_size > 64 else 1


def mla(g: Geometry, qo_lens: Sequence[int]) -> Need:
    """`MLAPlan`; `head_dim_vo` is head_dim_ckv."""
    return mla_of_clusters(g, mla_cluster(g, len(qo_lens), sum(qo_lens)))


def mla_of_clusters(g: Geometry, size: int) -> Need:
    """`MLAPlan`, if so many blocks form a cluster: nothing else of the requests counts."""
    sm = g.multiprocessors
    int_bytes = bytes_of_ints(*[MLA_MAX_WORKS] * 3, *[sm] * 5, *[MLA_MAX_WORKS] * 6)
    return Need(partial_bytes(g, 2 * (sm // size) * size * 64, 2), int_bytes)


def mla_works(g: Geometry, qo_lens: Sequence[int]) -> int:
    """Return the most work items that `MLAPlan` makes of these requests; it does not check its
    limit."""
    size = mla_cluster(g, len(qo_lens), sum(qo_lens))
    tiles = sum(_tiles(qo_lens, g.num_qo_heads, size * 64))
    return tiles + g.multiprocessors // size
