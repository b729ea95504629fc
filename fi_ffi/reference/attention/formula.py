"""Attention in float64, written from its definition and not from the kernels.

It serves the entries on the CPU, and the results of a GPU are compared with it. It computes one
request at a time, head by head. Each value comes with the magnitude that its rounding errors scale
with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fi_ffi.reference.arrays import Array

_NHD, _HND = ("NHD", 0), ("HND", 1)  # FlashInfer's layouts: names and codes


@dataclass(frozen=True)
class Options:
    """Variations of softmax(sm_scale * q @ k) @ v; each is off by default.

    `sm_scale`, `v_scale` and `sink` are numbers, or one for each query head. `mask` [qo_len,
    kv_len] says which keys each query sees, in addition to the other conditions. `alibi_slopes` add
    slope * (key - query) to logits, both positions counted from the request's start, whatever
    `kv_len - qo_len` is. `rope` is scale and theta.
    """

    sm_scale: float | Array
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float = 0.0
    mask: Array | None = None
    alibi_slopes: Array | None = None
    rope: tuple[float, float] | None = None
    sink: float | Array | None = None
    v_scale: float | Array = 1.0


class Exact(NamedTuple):
    """Results, and the magnitudes that their errors scale with.

    `out` and `magnitude`, the sum of p * |v|, are [qo_len, heads, head_dim_vo]. `lse2`, log2 of the
    sum of exponentials, and `spread`, the largest sum of |q * k| times sm_scale over the keys seen,
    are [qo_len, heads]. A relative error of 1 / N in each product changes logits by at most `spread
    / N`. So it changes `lse2` by as much (times log2(e)), and `out` by twice as much, relative to
    `magnitude`. Rows that see no key are 0 and -inf.
    """

    out: Array
    magnitude: Array
    lse2: Array
    spread: Array


def exact(q: Array, k: Array, v: Array, options: Options) -> Exact:
    """Compute the attention of one request: q [qo_len, heads, d], k [kv_len, kv_heads, d], and
    v."""
    (qo_len, heads, _), kv_len = q.shape, len(k)
    seen = _seen(qo_len, kv_len, options)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    if options.rope is not None:
        q64 = _rotated(q64, [kv_len - qo_len + i for i in range(qo_len)], *options.rope)
        k64 = _rotated(k64, list(range(kv_len)), *options.rope)
    per_group = heads // k.shape[1]
    columns = [
        _one_head(q64[:, h], k64[:, h // per_group], v64[:, h // per_group], seen, options, h)
        for h in range(heads)
    ]
    return Exact(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))


def _of_head(value: float | Array, head: int) -> float:
    return float(np.ravel(value)[head]) if np.ndim(value) else float(value)


def _seen(qo_len: int, kv_len: int, options: Options) -> Array:
    i, j = np.meshgrid(np.arange(qo_len), np.arange(kv_len), indexing="ij")
    place = kv_len - qo_len + i
    conditions = [np.full(i.shape, True)]
    if options.causal:
        conditions.append(j <= place)
    if options.window_left >= 0:
        conditions.append(place - j <= options.window_left)
    if options.mask is not None:
        conditions.append(options.mask.astype(bool))
    seen: Array = np.logical_and.reduce(conditions)
    return seen


def _rotated(x: Array, places: Sequence[int], scale: float, theta: float) -> Array:
    """Turn each pair (an element and the element half a head later) as a complex number."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    rates = np.array([theta ** (-i / half) / scale for i in range(half)])
    turned = pairs * np.exp(1j * np.outer(places, rates))[:, None, :]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _one_head(
    q: Array, k: Array, v: Array, seen: Array, options: Options, head: int
) -> tuple[Array, Array, Array, Array]:
    scale = _of_head(options.sm_scale, head)
    logits = q @ k.T * scale
    terms = np.abs(q) @ np.abs(k).T * abs(scale)
    if options.alibi_slopes is not None:
        steps = np.subtract.outer(-np.arange(len(q)), -np.arange(len(k)))
        bias = float(options.alibi_slopes[head]) * steps
        logits, terms = logits + bias, terms + np.abs(bias)
        if options.logits_soft_cap > 0:  # FlashInfer scales these twice
            logits, terms = logits * scale, terms * abs(scale)
    if options.logits_soft_cap > 0:
        logits = options.logits_soft_cap * np.tanh(logits / options.logits_soft_cap)
    logits[~seen] = -np.inf
    tops = logits.max(axis=1, initial=-np.inf)
    extra = np.full(len(q), -np.inf)
    if options.sink is not None:
        extra[:] = _of_head(options.sink, head)
        tops = np.maximum(tops, extra)
    tops[tops == -np.inf] = 0
    powers = np.exp(logits - tops[:, None])
    sums = powers.sum(axis=1) + np.exp(extra - tops)
    shares = powers / np.where(sums > 0, sums, 1)[:, None]
    with np.errstate(divide="ignore"):
        lse2 = (tops + np.log(sums)) / np.log(2)
    v_scale = _of_head(options.v_scale, head)
    out, magnitude = shares @ v * v_scale, shares @ np.abs(v) * abs(v_scale)
    return out, magnitude, lse2, np.where(seen, terms, 0).max(axis=1, initial=0.0)


# Keys and values of one request, without pages


def tokens_first(x: Array, layout: str | int) -> Array:
    """View an array with its heads after its tokens."""
    if layout not in _NHD + _HND:
        raise ValueError(f"layout {layout} is neither 0 (NHD) nor 1 (HND)")
    return x.swapaxes(-3, -2) if layout in _HND else x


def gathered(cache: Array, indices: Array, start: int, length: int) -> Array:
    """Return `length` tokens of a cache's pages, which begin at `indices[start]`."""
    page_size = cache.shape[1]
    if start < 0 or length < 0:
        raise ValueError(f"{length} tokens of pages that begin at {start}")
    pages = indices[start : start + -(-length // page_size)]
    if len(pages) * page_size < length:
        raise ValueError(f"{len(pages)} pages of {page_size} tokens for {length} tokens")
    return cache[pages].reshape(-1, *cache.shape[2:])[:length]


def lengths(indptr: Array, last_page_len: Array, page_size: int) -> Array:
    """Return the tokens of each request: those of its full pages and of its last."""
    pages = np.diff(indptr)
    return np.where(pages > 0, (pages - 1) * page_size + last_page_len[: len(pages)], 0)


def from_pages(
    cache: Array,
    indptr: Array,
    indices: Array,
    last_page_len: Array,
    request: int,
    layout: str = "NHD",
) -> Array:
    """Gather a request's tokens [kv_len, kv_heads, d] from a paged cache.

    A cache without heads, [pages, page_size, d], is MLA's, and gives [kv_len, 1, d].
    """
    if cache.ndim == 3:
        cache = cache[:, :, None]
    cache = tokens_first(cache, layout)
    length = int(lengths(indptr, last_page_len, cache.shape[1])[request])
    return gathered(cache, indices, int(indptr[request]), length)


def exact_batch(
    q: Array,
    qo_indptr: Array,
    keys: Callable[[int], tuple[Array, Array]],
    options: Options | Callable[[int], Options],
) -> Exact:
    """Compute all requests, one after another; `keys` returns a request's k and v.

    `options` applies to all requests, or returns a request's own options (its mask).
    """
    results = []
    for request in range(len(qo_indptr) - 1):
        own = options(request) if callable(options) else options
        rows = q[int(qo_indptr[request]) : int(qo_indptr[request + 1])]
        results.append(exact(rows, *keys(request), own))
    return Exact(*(np.concatenate(parts) for parts in zip(*results, strict=True)))
