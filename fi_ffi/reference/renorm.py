"""Filters of whole rows, from their definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs, OneOfMany

# The kernels flush subnormal float32 numbers to 0.
_FLUSHED = 2.0**-126 / SLACK
_TINY = 1e-8
# Rows smaller than this are searched, larger ones are counted in this many buckets.
_BUCKETS = 2048


def _k_of(a: Inputs, i: int) -> int:
    """Return a row's k; the kernel takes a negative one for a large one."""
    per_row = a.get("maybe_top_k_arr")
    return int(a["top_k_val"] if per_row is None else per_row[i]) % 2**32


def _is_kept(x: Array, k: int) -> Array:
    """Return which elements have fewer than `k` above them."""
    above = np.searchsorted(np.sort(-x), -x, side="left")
    kept: Array = above < k
    return kept


def top_k_renorm_probs(a: Inputs) -> Exact:
    value = np.zeros_like(a["probs"])
    for i, p in enumerate(a["probs"]):
        kept = np.where(_is_kept(p, _k_of(a, i)), p, 0)
        value[i] = kept / max(kept.sum(), _TINY)
    return {"renorm_probs": (value, value + _FLUSHED)}


def top_k_mask_logits(a: Inputs) -> Exact:
    """Return the logits themselves, or -inf; nothing is rounded."""

    right = np.empty_like(a["logits"])
    for i, x in enumerate(a["logits"]):
        right[i] = np.where(_is_kept(x, _k_of(a, i)), x, -np.inf)

    def judge(got: Array) -> tuple[float, float]:
        is_right = np.array_equal(got.astype(np.float64), right)
        return (0.0, 0.0) if is_right else (np.inf, np.inf)

    return {"mask_logits": OneOfMany(lambda: right, judge)}


def top_p_slack(size: int, is_deterministic: bool) -> float:
    """Return the largest error of a kernel's sums of a row.

    A search and a deterministic count make few roundings. Otherwise each bucket is a sequential sum
    of up to all elements, whose errors are practically random.
    """
    few = 256 + size / 512
    return float(2.0**-24 * (few if size < _BUCKETS or is_deterministic else few + 16 * size**0.5))


def top_p_error(
    p: Array, got: Array, top_p: float, within: float, is_counted: bool | None = None
) -> tuple[float, float]:
    """Return the error of a row that is to be the greatest of `p` that sum to `top_p`, divided by
    their sum. Rows are counted in buckets, or searched, by their size.

    The result shows which elements were kept. They must be all elements from some value on, their
    sum must be enough, and it must not be enough without the least of them.
    """
    total, is_counted = p.sum(), len(p) >= _BUCKETS if is_counted is None else is_counted
    if not (got >= 0).all():
        return np.inf, np.inf
    if not total > _TINY:
        return _distance(got, p)
    target = top_p * (total if is_counted else 1)
    kept = got > 0
    least = p[kept].min(initial=np.inf)
    chosen = p >= least
    mass, without = p[chosen].sum(), p[p > least].sum()
    is_all = not (p[~chosen] > 2.0**-100).any()
    slack = within * max(1.0, total)
    is_enough = mass >= target - slack or is_all
    if not is_enough and is_counted and target >= total - slack:
        is_enough = _lost_the_least(p, p[~chosen])
    if not is_enough or (without >= target + slack and without > 0):
        return np.inf, np.inf
    # A search that ends at its first step takes the sum of all for 1.
    sums = {float(mass), 1.0} if is_all and not is_counted and top_p < 1 else {float(mass)}
    return min(
        (_distance(got, np.where(chosen, p, 0) / one) for one in sums), key=lambda error: error[1]
    )


def _lost_the_least(p: Array, lost: Array) -> bool:
    """Whether the lost elements are among the least of a row.

    If all are to be kept, sums of buckets with other roundings may fall short of the total. The
    last bucket with elements is then counted twice. In rows that span several times 8 powers of
    two, it covers the last 8; in others, a quarter of one.
    """
    some = p[p > 0].astype(np.float32)
    has_several = some.min().view(np.uint32) >> 26 != some.max().view(np.uint32) >> 26
    shift = np.uint32(26 if has_several else 21)
    bits = lost[lost > 0].astype(np.float32).view(np.uint32) >> shift
    return bool((bits == some.min().view(np.uint32) >> shift).all())


def _distance(got: Array, value: Array) -> tuple[float, float]:
    error = np.abs(got - value)
    allowed = np.abs(value) * (2.0**-24 + SLACK) + 2 * _FLUSHED * SLACK
    return float(error.max(initial=0)), float((error / allowed).max(initial=0))


def top_p_renormed(p: Array, top_p: float, is_counted: bool | None = None) -> Array:
    """Return the greatest that sum to at least `top_p`, including ties, divided by their sum."""
    total, target = p.sum(), top_p
    is_counted = len(p) >= _BUCKETS if is_counted is None else is_counted
    if is_counted:
        target *= total
    elif top_p >= 1:
        return p / total if total > _TINY else p
    order = np.sort(p)[::-1]
    enough = np.flatnonzero(np.cumsum(order) >= target)
    if len(enough):
        threshold = order[enough[0]]
    elif not is_counted:
        return np.where(p > 0, p, 0)
    else:
        threshold = order[-1]
    kept = np.where(p >= threshold, p, 0)
    total = kept.sum()
    return kept / total if total > _TINY else kept


def top_p_renorm_probs(a: Inputs) -> Exact:
    per_row: Any = a.get("maybe_top_p_arr")
    rows = range(len(a["probs"]))
    tops = [float(np.float32(a["top_p_val"] if per_row is None else per_row[i])) for i in rows]

    def value() -> Array:
        made = [top_p_renormed(p, top_p) for p, top_p in zip(a["probs"], tops, strict=True)]
        return np.reshape(made, a["probs"].shape)

    def judge(got: Array) -> tuple[float, float]:
        is_deterministic = bool(a.get("is_deterministic", True))
        errors = [
            top_p_error(
                p, got[i].astype(np.float64), tops[i], top_p_slack(len(p), is_deterministic)
            )
            for i, p in enumerate(a["probs"])
        ]
        return max(errors, key=lambda error: error[1], default=(0.0, 0.0))

    return {"renorm_probs": OneOfMany(value, judge)}


RENORM: dict[str, Formula] = {
    "top_k_renorm_probs": top_k_renorm_probs,
    "top_k_renorm_probs_deterministic": top_k_renorm_probs,
    "top_p_renorm_probs": top_p_renorm_probs,
    "top_k_mask_logits": top_k_mask_logits,
}
