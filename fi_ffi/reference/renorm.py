"""Filters of whole rows in numpy: of probabilities, made to sum to 1 again, and of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array, store

# As many elements as the radix kernel has buckets: smaller rows are searched, and then `top_p` is
# of 1 and not of what the row sums to.
_RADIX = 2048
_TINY = 1e-8


def _parameters(array: Array | None, number: Any, rows: int) -> Array:
    parameters: Array = np.broadcast_to(np.asarray(number if array is None else array), rows)
    return parameters


def _top_p(p: Array, top_p: float) -> Array:
    """The greatest that sum to `top_p` or more, ties among them, over their sum."""
    p = p.astype(np.float64)
    total = p.sum()
    target, size = top_p, len(p)
    if size >= _RADIX:
        target *= total
    elif top_p >= 1:
        return p / total if total > _TINY else p
    order = np.sort(p)[::-1]
    enough = np.flatnonzero(np.cumsum(order) >= target)
    if len(enough):
        threshold = order[enough[0]]
    elif size < _RADIX:
        return np.where(p > 0, p, 0)
    else:
        threshold = order[-1]
    kept = np.where(p >= threshold, p, 0)
    total = kept.sum()
    return kept / total if total > _TINY else kept


def top_p_renorm_probs(
    probs: Array, renorm_probs: Array, maybe_top_p_arr: Array | None, top_p_val: float,
    is_deterministic: bool = False, workspace: Array | None = None,
) -> None:  # fmt: skip
    parameters = _parameters(maybe_top_p_arr, top_p_val, len(probs))
    for p, out, top_p in zip(probs, renorm_probs, parameters, strict=True):
        store(out, _top_p(p, float(np.float32(top_p))))


def _kept(x: Array, k: int) -> Array:
    """Which are not less than the k-th greatest; a negative `k` is a large one to the kernel."""
    k %= 2**32
    if not 0 < k < len(x):
        return np.full(len(x), k > 0)
    kept: Array = x >= np.partition(x, len(x) - k)[len(x) - k]
    return kept


def top_k_renorm_probs(
    probs: Array, renorm_probs: Array, maybe_top_k_arr: Array | None, top_k_val: int, *_: Any
) -> None:
    parameters = _parameters(maybe_top_k_arr, top_k_val, len(probs))
    for row, out, k in zip(probs, renorm_probs, parameters, strict=True):
        p = row.astype(np.float32)
        kept = np.where(_kept(p, int(k)), p, np.float32(0))
        total = np.float32(kept.sum(dtype=np.float64))
        store(out, kept * (np.float32(1) / max(total, np.float32(_TINY))))


def top_k_mask_logits(
    logits: Array, mask_logits: Array, maybe_top_k_arr: Array | None, top_k_val: int, *_: Any
) -> None:
    parameters = _parameters(maybe_top_k_arr, top_k_val, len(logits))
    for row, out, k in zip(logits, mask_logits, parameters, strict=True):
        x = row.astype(np.float32)
        store(out, np.where(_kept(x, int(k)), x, np.float32(-np.inf)))


RENORM: dict[str, Callable[..., None]] = {
    kernel.__name__: kernel
    for kernel in (top_p_renorm_probs, top_k_renorm_probs, top_k_mask_logits)
}
RENORM["top_k_renorm_probs_deterministic"] = RENORM["top_k_renorm_probs"]
