"""The `rope` module in numpy: float32 arithmetic, as `include/flashinfer/pos_enc.cuh` has it.

Angles are of float64, where the kernels take powers, sines and cosines at the hardware's
precision: see docs/rope.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array, store


def rotated(x: Array, cos: Array, sin: Array, interleave: bool) -> Array:
    """Heads [tokens, heads, size] in float32, their first elements turned by [tokens, pairs]."""
    result: Array = x.astype(np.float32)
    pairs = cos.shape[-1]
    if interleave:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    a, b = result[..., first].copy(), result[..., second].copy()
    cos, sin = cos[:, None].astype(np.float32), sin[:, None].astype(np.float32)
    result[..., first] = a * cos - b * sin
    result[..., second] = b * cos + a * sin
    return result


def _frequencies(
    rotary_dim: int, rope_scale: float, rope_theta: float, slope: float = 0.0, shift: float = 0.0
) -> Array:
    """How much each pair turns from one position to the next.

    Frequencies are divided by the scale where `slope * frequency + shift` is 0 or less, are as they
    are where it is 1 or more, and something between the two in between.
    """
    own = rope_theta ** (-np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    kept = np.clip(own * slope + shift, 0, 1)
    frequencies: Array = (1 - kept) * own / rope_scale + kept * own
    return frequencies


def _smoothing(low: float, high: float, length: float) -> tuple[float, float]:
    return length / (2 * np.pi * (high - low)), -low / (high - low)


def _apply(
    q: Array, k: Array, q_rope: Array, k_rope: Array, tokens: Array | slice, positions: Array,
    frequencies: Array, interleave: bool,
) -> None:  # fmt: skip
    angles = positions.astype(np.float64)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    for x, out in ((q, q_rope), (k, k_rope)):
        store(out[tokens], rotated(x[tokens], cos, sin, interleave))


def _ragged_positions(indptr: Array, offsets: Array, tokens: int) -> Array:
    """The position of each token that is of a request."""
    lengths = np.diff(indptr)
    if indptr[0] or (lengths < 0).any() or indptr[-1] > tokens:
        raise IndexError(f"indptr does not rise from 0 to {tokens} at most")
    steps = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    positions: Array = np.repeat(offsets, lengths) + steps
    return positions


def apply_rope(
    q: Array, k: Array, q_rope: Array, k_rope: Array, indptr: Array, offsets: Array,
    rotary_dim: int, interleave: bool, rope_scale: float, rope_theta: float, *smoothing: float,
) -> None:  # fmt: skip
    positions = _ragged_positions(indptr, offsets, len(q))
    between = _smoothing(*smoothing) if smoothing else ()
    frequencies = _frequencies(rotary_dim, rope_scale, rope_theta, *between)
    _apply(q, k, q_rope, k_rope, slice(len(positions)), positions, frequencies, interleave)


def apply_rope_pos_ids(
    q: Array, k: Array, q_rope: Array, k_rope: Array, pos_ids: Array,
    rotary_dim: int, interleave: bool, rope_scale: float, rope_theta: float, *smoothing: float,
) -> None:  # fmt: skip
    between = _smoothing(*smoothing) if smoothing else ()
    frequencies = _frequencies(rotary_dim, rope_scale, rope_theta, *between)
    _apply(q, k, q_rope, k_rope, slice(None), pos_ids, frequencies, interleave)


def looked_up(cos_sin_cache: Array, pos_ids: Array) -> tuple[Array, Array]:
    """Cosines and sines of each token; the kernels do not look at the positions."""
    inside = (pos_ids >= 0) & (pos_ids < len(cos_sin_cache))
    if not inside.all():
        token = int(np.argmin(inside))
        raise IndexError(f"token {token} is at a position that the cache has not")
    half = cos_sin_cache.shape[1] // 2
    rows = cos_sin_cache[pos_ids]
    return rows[:, :half], rows[:, half:]


def apply_rope_pos_ids_cos_sin_cache(
    q: Array, k: Array, q_rope: Array, k_rope: Array, cos_sin_cache: Array, pos_ids: Array,
    interleave: bool,
) -> None:  # fmt: skip
    cos, sin = looked_up(cos_sin_cache, pos_ids)
    for x, out in ((q, q_rope), (k, k_rope)):
        store(out, rotated(x, cos, sin, interleave))


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "rope": {
        "apply_rope": apply_rope,
        "apply_llama31_rope": apply_rope,
        "apply_rope_pos_ids": apply_rope_pos_ids,
        "apply_llama31_rope_pos_ids": apply_rope_pos_ids,
        "apply_rope_pos_ids_cos_sin_cache": apply_rope_pos_ids_cos_sin_cache,
    }
}
