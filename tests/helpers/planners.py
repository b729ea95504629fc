"""What FlashInfer's planners set aside, step by step as scheduler.cuh does it: lists of all pieces,
where `fi_ffi.ops.attention.sizes` has formulas.

Those of 0.6.13, and with `by_query` of 0.7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from fi_ffi.ops.attention.sizes import Geometry


class Allocated:
    """`AlignedAllocator`: how many bytes of a workspace are taken."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, size: int, alignment: int = 16) -> None:
        while self.end % alignment:
            self.end += 1
        self.end += size


def cut(whole: int, part: int) -> int:
    """How many parts a whole has, the last of which may be shorter."""
    return len(range(0, whole, part))


def tile_of(packed: int, g: Geometry) -> int:
    """`FA2DetermineCtaTileQ`."""
    if packed > 64 and g.head_dim_vo < 256:
        return 128
    return 64 if packed > 16 or g.major < 8 else 16


def prefill_fa2(
    g: Geometry, queries: Sequence[int], pages: Sequence[int], rows: int
) -> tuple[int, int, bool]:
    """`PrefillPlan`: bytes of the float and of the int workspace, and whether it splits."""
    heads, group = g.num_qo_heads, g.num_qo_heads // g.num_kv_heads
    requests = len(queries)
    most = max(2 * g.multiprocessors - g.num_colocated_ctas, 0) // g.num_kv_heads
    if not g.enable_cuda_graph:
        tile = tile_of(sum(each * group for each in queries) // requests, g)
        total = 0
    elif g.uniform_q_len:
        tile = tile_of(g.uniform_q_len * group, g)
        total = requests * cut(g.uniform_q_len * group, tile)
    else:
        tile = tile_of((rows - requests + 1) % 2**32 * group, g)
        total = cut(rows * group, tile) + requests - 1
    seen = [
        min(each, cut(g.window_left + tile, g.page_size)) if g.window_left >= 0 else each
        for each in pages
    ]
    tiles = [cut(each * group, tile) for each in queries]
    longest, chunk, split = max(1, *seen), 0, False
    if g.fixed_split_size > 0 and not g.disable_split_kv:
        chunk = g.fixed_split_size
    elif not g.disable_split_kv:
        # The first that leaves no more pieces than blocks; a larger one leaves no more than it.
        for chunk in count(max(128 // g.page_size, 1)):
            pieces = sum(n * cut(max(each, 1), chunk) for n, each in zip(tiles, seen, strict=True))
            if chunk >= longest or pieces <= most:
                break
        split = g.enable_cuda_graph or chunk < longest
    pieces = []
    for request, (each, keys) in enumerate(zip(tiles, seen, strict=True)):
        parts = 1 if g.disable_split_kv else cut(max(keys, 1), chunk)
        split = split or (g.fixed_split_size > 0 and parts > 1)
        pieces += [(request, i, j) for i in range(each) for j in range(parts)]
    padded = max(most, total) if g.enable_cuda_graph else len(pieces)
    ints, floats = Allocated(), Allocated()
    for size in (4 * padded, 4 * padded, 4 * padded, 4 * (requests + 1)):
        ints.take(size)
    ints.take(4, 1)
    if g.enable_cuda_graph:
        ints.take(4)
    if split:
        partial = cut(padded * tile, group) if g.by_query else padded * tile
        floats.take(heads * partial * g.head_dim_vo * 4)
        floats.take(heads * partial * 4)
        ints.take(4 * (rows + 1))
    if g.enable_cuda_graph or (split and not g.by_query):
        ints.take(padded)
    return floats.end, ints.end, split


def prefill_fa3(
    g: Geometry, queries: Sequence[int], pages: Sequence[int], rows: int
) -> tuple[int, int, bool]:
    """`PrefillSM90Plan`."""
    tile = 192 if g.head_dim_vo == 64 else 128
    most = cut(rows, tile) + len(queries) - 1
    heads = 1 if most > 4096 else g.num_qo_heads
    works = heads * most if g.enable_cuda_graph else heads * sum(cut(n, tile) for n in queries)
    ints = Allocated()
    for size in (*[works] * 6, g.multiprocessors + 1, works):
        ints.take(4 * size)
    return 0, ints.end, False


def decode(g: Geometry, pages: Sequence[int], blocks: int) -> tuple[int, int, bool]:
    """`DecodePlan` where so many of its blocks fit on a multiprocessor."""
    grid, split, padded = blocks * g.multiprocessors, False, len(pages)
    if len(pages) * g.num_kv_heads < grid:
        low, longest = max(128 // g.page_size, 1), max(pages)
        for chunk in range(low, max(longest, low) + 1):
            if sum(cut(n, chunk) for n in pages) * g.num_kv_heads <= grid:
                break
        made = sum(cut(max(n, 1), chunk) for n in pages)
        split = made != len(pages) or g.enable_cuda_graph
        padded = made
    if g.enable_cuda_graph:
        padded = grid // g.num_kv_heads if split else len(pages)
    ints, floats = Allocated(), Allocated()
    for size in (4 * padded, 4 * padded, 4 * (padded + 1)):
        ints.take(size)
    ints.take(4, 1)
    if split:
        floats.take(g.num_qo_heads * padded * g.head_dim_vo * 4)
        floats.take(g.num_qo_heads * padded * 4)
        ints.take(padded)
    return floats.end, ints.end, split


def single(
    queries: int, keys: int, heads: tuple[int, int], head_dim: int, tile: int, blocks: int
) -> int:
    """Bytes of `tmp` that a prefill of one request writes, or a decode, which has one tile for each
    head of keys; so many blocks fit on the GPU."""
    qo_heads, kv_heads = heads
    tiles = kv_heads * cut(queries * (qo_heads // kv_heads), tile)
    most = blocks // tiles
    chunks = cut(keys, max(cut(keys, most), 256)) if most else 0
    return chunks * queries * qo_heads * (2 * head_dim + 4) if chunks > 1 else 0


def mla(
    g: Geometry, queries: Sequence[int], keys: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """`MLAPlan`: bytes of the float and of the int workspace; work items, merging blocks, and rows
    of partial results."""
    heads, sms = g.num_qo_heads, g.multiprocessors
    size = 2 if sum(each * heads for each in queries) // len(queries) > 64 else 1
    clusters, tile = sms // size, 64 * size
    tiles = [
        (min(tile, n * heads - start), each)
        for n, each in zip(queries, keys, strict=True)
        for start in range(0, n * heads, tile)
    ]
    mean = max(cut(sum(each for _, each in tiles), clusters), 1)
    limits = {8: 32, 16: 64, 32: 128, 64: 192}
    limit = next((limits[most] for most in limits if mean <= most), cut(mean, 256) * 256)
    works = merging = partial = 0
    for rows, each in tiles:
        parts = max(cut(each, limit), 1)
        works += parts
        if each > limit:
            merging += cut(rows, cut(rows, max(each * size // limit, 1)))
            partial += parts * rows
    ints, floats = Allocated(), Allocated()
    for each in (*[16384] * 3, *[sms] * 5, *[16384] * 6):
        ints.take(4 * each)
    floats.take(2 * clusters * tile * 2 * g.head_dim_vo)
    floats.take(2 * clusters * tile * 4)
    return (floats.end, ints.end), (works, merging, partial)
