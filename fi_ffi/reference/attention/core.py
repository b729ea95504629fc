"""Attention of one request in float32: what all the attention entries compute.

Query i is at position `kv_len - qo_len + i` of its request, key j at position j.

What the kernels do otherwise, and results are to be judged by: prefill rounds the
probabilities to the queries' dtype before it multiplies by the values (with fp8 queries:
to that fp8 dtype); tanh, exp2 and sines are approximations, of about 2^-11 and 2^-22; and
5e4 stands for infinity, in prefill on logits before `sm_scale`.  Hidden keys there count
for `exp(-5e4 * sm_scale - largest logit)`.  From `sm_scale` 0.003 on that is nothing, but
the scales of fp8 queries and keys are part of it: where those fill float8_e4m3fn it is
about 1e-5, and fa3 sees what it should not (FlashInfer's pull request 4401, after
0.6.18).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fi_ffi.reference.arrays import Array

_LOG2_E = np.float32(np.log2(np.e))


class Rope(NamedTuple):
    """RoPE as Llama has it: element i of a head's first half turns with i of its second."""

    rcp_scale: float
    rcp_theta: float
    # The prefill kernels turn q and k where they lie, in their dtype; decode in registers.
    rounds: bool


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    sm_scale: Array | float,
    causal: bool = False,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    rope: Rope | None = None,
    sink: Array | None = None,
) -> tuple[Array, Array]:
    """The output, [qo_len, heads, head_dim_vo], and each row's log2 of the sum of exponentials.

    `sm_scale` is a number or one for each head.  `sink` is a logit of each head that
    joins the sum, natural and not scaled.  A row that sees no key is 0, with an infinite
    negative logarithm.
    """
    (qo_len, heads, _), (kv_len, kv_heads, dim_vo) = q.shape, v.shape
    visible = _visible(qo_len, kv_len, causal, window_left, mask)
    first = kv_len - qo_len
    queries = _turned(q, np.arange(first, first + qo_len), rope).swapaxes(0, 1)
    keys = _turned(k, np.arange(kv_len), rope).swapaxes(0, 1)
    values = v.astype(np.float32).swapaxes(0, 1)
    scales = np.broadcast_to(np.asarray(sm_scale, np.float32), heads)
    # Not relative positions: the kernels count both from the request's start, and a
    # decoded query as 0.  That shifts a row's logits alike, and with them its logarithm.
    distance = np.arange(kv_len)[None, :] - np.arange(qo_len)[:, None]
    out = np.empty((heads, qo_len, dim_vo), np.float32)
    lse = np.empty((heads, qo_len), np.float32)
    for kv_head, group in enumerate(np.array_split(np.arange(heads), kv_heads)):
        logits = queries[group] @ keys[kv_head].T
        slopes = None if alibi_slopes is None else alibi_slopes[group, None, None] * distance
        scale = scales[group, None, None]
        exponents = _exponents(logits, scale, np.float32(logits_soft_cap), slopes)
        sinks = None if sink is None else sink[group, None].astype(np.float32) * _LOG2_E
        out[group], lse[group] = _weighted(exponents, visible, values[kv_head], sinks)
    return out.swapaxes(0, 1), lse.T


def _visible(qo_len: int, kv_len: int, causal: bool, window_left: int, mask: Array | None) -> Array:
    """Which keys each query sees; `window_left` counts back from the query's own."""
    position = np.arange(qo_len)[:, None] + (kv_len - qo_len)
    key = np.arange(kv_len)[None, :]
    visible = np.ones((qo_len, kv_len), bool) if mask is None else mask.copy()
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    return visible


def _turned(x: Array, positions: Array, rope: Rope | None) -> Array:
    """x in float32, with its heads turned by their positions."""
    wide = x.astype(np.float32)
    if rope is None:
        return wide
    half = x.shape[-1] // 2
    powers = (2 * np.arange(half) / x.shape[-1]).astype(np.float32)
    frequencies = np.float32(rope.rcp_scale) * np.float32(rope.rcp_theta) ** powers
    angles = positions.astype(np.float32)[:, None, None] * frequencies
    cosines, sines = np.cos(angles), np.sin(angles)
    first, second = wide[..., :half], wide[..., half:]
    turned = np.concatenate(
        (first * cosines - second * sines, second * cosines + first * sines), axis=-1
    )
    return turned.astype(x.dtype).astype(np.float32) if rope.rounds else turned


def _exponents(logits: Array, scale: Array, cap: np.float32, slopes: Array | None) -> Array:
    """What 2 is raised to.  With ALiBi and a cap the kernels apply `sm_scale` twice."""
    if slopes is not None:
        logits = logits * scale + slopes.astype(np.float32)
    if cap > 0:
        exponents: Array = np.tanh(logits * (scale / cap)) * (cap * _LOG2_E)
    else:
        exponents = logits * (scale * _LOG2_E if slopes is None else _LOG2_E)
    return exponents


def _weighted(
    exponents: Array, visible: Array, values: Array, sinks: Array | None
) -> tuple[Array, Array]:
    exponents = np.where(visible, exponents, np.float32(-np.inf))
    largest = exponents.max(axis=-1, initial=-np.inf)
    if sinks is not None:
        largest = np.maximum(largest, sinks)
    largest = np.where(largest == -np.inf, np.float32(0), largest)
    with np.errstate(all="ignore"):
        weights = np.exp2(exponents - largest[..., None])
        total = weights.sum(axis=-1, dtype=np.float32)
        if sinks is not None:
            total = total + np.exp2(sinks - largest)
        out = weights @ values / total[..., None]
        return np.where(total[..., None] == 0, np.float32(0), out), largest + np.log2(total)
