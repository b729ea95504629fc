"""Which tokens a sampling kernel may give: those that float32 rounding could lead to.

Kernels add probabilities up in float32, in an order of their own.  Where a running sum is as near
to what was drawn as its rounding errors are large, the token before and the one after are both
right; and where a filter is decided as narrowly, both decisions are.  All that may follow is
followed here in float64, the nearest first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

# Roundings on the way of a sum, however long the row is (in a thread, across a block, and back),
# and elements of a row for each half of one more.
_SHORT, _LONG = 64, 2048
_STEP = 2.0**-24
# A row that has no token.
NONE = -1
# States of a filter's rounds that are followed.  What a kernel did is among the first.
_MOST = 500


def slack(p: Array) -> float:
    """How far a sum over a row can be off."""
    total = max(1.0, float(np.nansum(np.where(p > 0, p, 0))))
    return _STEP * (_SHORT + len(p) / _LONG) * total


def around(p: Array, chosen: Array, at: float, within: float) -> list[tuple[float, int]]:
    """The chosen tokens whose part of the running sum may have `at` in it, the last one's without
    an end, by how far that is from being so."""
    part = np.where(chosen, p, 0)
    end = np.cumsum(part)
    off = np.maximum(end - part - at, at - end)
    last = np.flatnonzero(chosen)[-1:]
    off[last] = (end - part - at)[last]
    may = np.flatnonzero(chosen & (off <= within))
    return sorted((max(float(off[token]), 0.0), int(token)) for token in may)


class Filter:
    """Whether so few tokens are above a pivot that a top-k and a top-p filter let it through.

    `within` is what sums may be off, `slack(p)` by default.
    """

    def __init__(self, p: Array, k: float, top_p: float, within: float | None = None) -> None:
        self._order = -np.sort(-np.where(np.isnan(p), 0, p))
        self._sums = np.concatenate([[0.0], np.cumsum(self._order)])
        self._k, self._top_p = k, top_p
        self.within = slack(p) if within is None else within

    def above(self, pivot: float) -> tuple[int, float]:
        """How many are above it, and what they sum to."""
        count = int(np.searchsorted(-self._order, -pivot, side="left"))
        return count, float(self._sums[count])

    def passes(self, pivot: float) -> dict[bool, float]:
        """What a kernel may decide, and how far it is from doing so."""
        count, total = self.above(pivot)
        if count >= self._k:
            return {False: 0.0}
        off = total - self._top_p
        decided = {off < 0: 0.0}
        return decided | ({off >= 0: abs(off)} if abs(off) < self.within else {})


# The bounds of the next pivots, and how far a round is from ending with them.
Next = list[tuple[float, float, float]]


def rejected(p: Array, kept: Filter, numbers: Iterable[float]) -> Iterator[int]:
    """The tokens that drawing again above a rising pivot may end with, NONE among them."""
    within, order = kept.within, itertools.count()
    drawn, more = list[float](), iter(numbers)
    open_ones = [(0.0, next(order), 0, 0.0, 1.0)]
    for _ in range(_MOST):
        if not open_ones:
            return
        cost, _, n, low, high = heapq.heappop(open_ones)
        while len(drawn) <= n:
            drawn.append(next(more))
        at = drawn[n] * (kept.above(low)[1] if n else 1.0)
        tokens = around(p, p > low, at, within)
        if not tokens:
            yield NONE
        seen: dict[float, tuple[bool, Next]] = {}
        for off, token in tokens:
            value = float(p[token])
            is_new = value not in seen
            is_taken, after = seen.setdefault(value, _round(value, high, kept))
            # Where the bounds meet, the kernel takes what it has.
            if is_taken or any(first >= second for _, first, second in after):
                yield token
            for more_off, first, second in after if is_new else ():
                if first < second:
                    state = (cost + off + more_off, next(order), n + 1, first, second)
                    heapq.heappush(open_ones, state)


def _round(value: float, high: float, kept: Filter) -> tuple[bool, Next]:
    """Whether a token of this probability may be taken, and else the bounds that may come next."""
    second = float(np.float32(np.float32(value) + np.float32(high)) * np.float32(0.5))
    decided = kept.passes(value)
    after: Next = []
    if False in decided:
        for is_enough, off in kept.passes(second).items():
            bounds = (value, second) if is_enough else (second, high)
            after.append((decided[False] + off, *bounds))
    return True in decided, after


def tokens_judge(allowed: Callable[[int], Iterable[int]], valid: bool = False) -> Any:
    """A judge of tokens, or of flags of what is valid, by what is allowed at each place."""

    def name(token: int) -> Any:
        return token != NONE if valid else max(token, 0)

    def judge(got: Array) -> tuple[float, float]:
        for i, one in enumerate(got):
            if not any(one == name(token) for token in allowed(i)):
                return np.inf, np.inf
        return 0.0, 0.0

    return judge
