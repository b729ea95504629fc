"""Which of many results are compared: the formula in float64 takes longer than a GPU."""

from __future__ import annotations

import numpy as np

from tests.attention.batches import Batch

# A request of more queries times keys than this is compared by some of its rows, a batch
# of more requests by some of them, and MLA with more heads by some that lie side by side.
ALL_ROWS, ALL_REQUESTS, SOME_HEADS = 1 << 16, 16, 8


def sample(batch: Batch, rng: np.random.Generator) -> list[int]:
    """Requests to compare: all, or the first and last ones, the longest and some others."""
    count = len(batch.qo)
    if count <= ALL_REQUESTS:
        return list(range(count))
    some = rng.permutation(count)[: ALL_REQUESTS - 6].tolist()
    longest = int(np.argmax(batch.kv))
    return sorted({0, 1, 2, 3, longest, count - 1, *some})


def row_blocks(qo: int, kv: int, whole: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Rows to compare: all, or the first and last ones, those around tiles' ends and some."""
    if not qo or whole or qo * kv <= ALL_ROWS:
        return [(0, qo)] if qo else []
    starts = {0, qo - 3, int(rng.integers(0, qo)), *(n for n in (63, 127, 191) if n < qo)}
    return [(a, min(a + 3, qo)) for a in sorted(starts) if a >= 0]


def some_heads(heads: int, rng: np.random.Generator) -> slice:
    """Heads to compare, of queries that share their keys."""
    first = int(rng.integers(0, max(heads - SOME_HEADS, 0) + 1))
    return slice(first, min(first + SOME_HEADS, heads))
