"""The `cascade` module in numpy: float32 arithmetic, as `attention/cascade.cuh` has it.

Up to FlashInfer 0.7.1 its infinity is 5e4: the state that a merge of many begins with is at -5e4,
and counts as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fi_ffi.reference.arrays import Array, store

# Threads that a block of `merge_states` has where there are no fewer sets than tokens.
_THREADS = 128

Weight = Callable[[Array, Array], Array]


def _weight(s: Array, most: Array) -> Array:
    weight: Array = np.exp2(s - most)
    return weight


def _weight_of_empty_ones(s: Array, most: Array) -> Array:
    """Of a state at minus infinity 0, also where all are."""
    # The maximum of a NaN and a number is the number, as CUDA has it.
    weight: Array = np.exp2(np.fmax(s - most, np.float32(-np.inf)))
    return weight


def _nothing(of: Weight) -> float:
    """The log-sum-exp of no keys."""
    return -5e4 if of is _weight else -np.inf


def _share(weight: Array, total: Array, of: Weight) -> Array:
    share: Array = weight / total
    return share if of is _weight else np.where(total > 0, share, np.float32(0))


def _merge(v: Array, s: Array, v_b: Array, s_b: Array, of: Weight) -> tuple[Array, Array]:
    most = np.fmax(s, s_b)
    a, b = of(s, most), of(s_b, most)
    total = a + b
    share_a, share_b = (_share(weight, total, of)[..., None] for weight in (a, b))
    merged: Array = share_a * v.astype(np.float32) + share_b * v_b.astype(np.float32)
    return merged, np.log2(total) + most


def merge_state(
    v_a: Array, s_a: Array, v_b: Array, s_b: Array, v_merged: Array, s_merged: Array,
    *, of: Weight = _weight,
) -> None:  # fmt: skip
    v, s_merged[...] = _merge(v_a, s_a, v_b, s_b, of)
    store(v_merged, v)


def merge_state_in_place(
    v: Array, s: Array, v_other: Array, s_other: Array, mask: Array | None, *, of: Weight = _weight
) -> None:
    merged, lse = _merge(v, s, v_other, s_other, of)
    chosen = slice(None) if mask is None else mask.astype(bool)
    v[chosen] = merged[chosen].astype(v.dtype)
    s[chosen] = lse[chosen]


def _of_many(v: Array, s: Array, of: Weight) -> tuple[Array, Array]:
    """The state of the sets along the second axis, and of the one that it begins with."""
    nothing = _nothing(of)
    most = np.fmax.reduce(s, axis=1, initial=nothing)
    weights = of(s, most[:, None])
    total = np.sum(weights, axis=1) + of(np.full_like(most, nothing), most)
    merged = np.einsum("nkhd,nkh->nhd", v.astype(np.float32), weights)
    if of is _weight:
        return merged / total[..., None], most + np.log2(total)
    divided = np.where(total[..., None] > 0, merged / total[..., None], np.float32(0))
    return divided, most + np.log2(total)


def merge_states(
    v: Array, s: Array, v_merged: Array, s_merged: Array, *, of: Weight = _weight
) -> None:
    n, sets, _, head_dim = v.shape
    if sets < n and sets < 2:  # nothing is computed
        v_merged[...] = v[:, 0] if sets else 0
        s_merged[...] = s[:, 0] if sets else _nothing(of)
        return
    if sets >= n:
        rows = _THREADS // min(head_dim // 8, 32)
        parts = [_of_many(v[:, i::rows], s[:, i::rows], of) for i in range(rows)]
        v = np.stack([part.astype(v.dtype) for part, _ in parts], axis=1)
        s = np.stack([lse for _, lse in parts], axis=1)
    merged, s_merged[...] = _of_many(v, s, of)
    store(v_merged, merged)


_KERNELS: tuple[Callable[..., None], ...] = (merge_state, merge_state_in_place, merge_states)
KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "cascade": {kernel.__name__: kernel for kernel in _KERNELS}
    | {
        f"{kernel.__name__}_of_empty_ones": functools.partial(kernel, of=_weight_of_empty_ones)
        for kernel in _KERNELS
    }
}
