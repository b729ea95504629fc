"""The tokens that a sampling kernel may return: those that float32 rounding could lead to.

Kernels add up probabilities in float32, in their own order. If a running sum is as near to the
drawn number as its rounding errors are large, the tokens before and after are both right. If a
filter's decision is as close, both decisions are right. This module follows all possibilities in
float64, the nearest first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

# Roundings of a sum for a row of any length (in a thread, across a block, and back), and the
# elements of a row that add half a rounding.
_SHORT, _LONG = 64, 2048
_STEP = 2.0**-24
# The token of a row without one.
NONE = -1
# The most states of a filter's rounds that are followed; a kernel's is among the first.
_MOST = 500


def slack(p: Array) -> float:
    """Return the largest error of a sum over a row."""
    total = max(1.0, float(np.nansum(np.where(p > 0, p, 0))))
    return _STEP * (_SHORT + len(p) / _LONG) * total


def around(p: Array, chosen: Array, at: float, within: float) -> list[tuple[float, int]]:
    """Return the chosen tokens whose part of the running sum may contain `at`, with the distance.

    The last token's part has no end. The tokens are sorted by how far `at` is from their part.
    """
    part = np.where(chosen, p, 0)
    end = np.cumsum(part)
    off = np.maximum(end - part - at, at - end)
    last = np.flatnonzero(chosen)[-1:]
    off[last] = (end - part - at)[last]
    may = np.flatnonzero(chosen & (off <= within))
    return sorted((max(float(off[token]), 0.0), int(token)) for token in may)


class Filter:
    """A top-k and a top-p filter, which accept a pivot if few enough tokens are above it.

    `within` is the largest error of sums, by default `slack(p)`.
    """

    def __init__(self, p: Array, k: float, top_p: float, within: float | None = None) -> None:
        self._order = -np.sort(-np.where(np.isnan(p), 0, p))
        self._sums = np.concatenate([[0.0], np.cumsum(self._order)])
        self._k, self._top_p = k, top_p
        self.within = slack(p) if within is None else within

    def above(self, pivot: float) -> tuple[int, float]:
        """Return the number and the sum of the tokens above a pivot."""
        count = int(np.searchsorted(-self._order, -pivot, side="left"))
        return count, float(self._sums[count])

    def passes(self, pivot: float) -> dict[bool, float]:
        """Return the decisions that a kernel may make, with the distance of each."""
        count, total = self.above(pivot)
        if count >= self._k:
            return {False: 0.0}
        off = total - self._top_p
        decided = {off < 0: 0.0}
        return decided | ({off >= 0: abs(off)} if abs(off) < self.within else {})


# The bounds of the next pivots, and how far a round is from ending with each.
Next = list[tuple[float, float, float]]


def rejected(p: Array, kept: Filter, numbers: Iterable[float]) -> Iterator[int]:
    """Yield the tokens with which rejection sampling above a rising pivot may end, including
    NONE."""
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
            # If the bounds meet, the kernel takes its current token.
            if is_taken or any(first >= second for _, first, second in after):
                yield token
            for more_off, first, second in after if is_new else ():
                if first < second:
                    state = (cost + off + more_off, next(order), n + 1, first, second)
                    heapq.heappush(open_ones, state)


def _round(value: float, high: float, kept: Filter) -> tuple[bool, Next]:
    """Return whether a token of this probability may be accepted, and otherwise the possible next
    bounds."""
    second = float(np.float32(np.float32(value) + np.float32(high)) * np.float32(0.5))
    decided = kept.passes(value)
    after: Next = []
    if False in decided:
        for is_enough, off in kept.passes(second).items():
            bounds = (value, second) if is_enough else (second, high)
            after.append((decided[False] + off, *bounds))
    return True in decided, after


def tokens_judge(allowed: Callable[[int], Iterable[int]], valid: bool = False) -> Any:
    """Return a judge of tokens (or of `valid` flags), from the tokens allowed in each place."""

    def name(token: int) -> Any:
        return token != NONE if valid else max(token, 0)

    def judge(got: Array) -> tuple[float, float]:
        for i, one in enumerate(got):
            if not any(one == name(token) for token in allowed(i)):
                return np.inf, np.inf
        return 0.0, 0.0

    return judge
