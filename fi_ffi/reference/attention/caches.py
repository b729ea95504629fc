"""Keys and values of one request, side by side."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array

_NHD, _HND = 0, 1


def tokens_first(x: Array, layout: int) -> Array:
    """The same array with its heads after its tokens; `layout` is FlashInfer's code."""
    if layout not in (_NHD, _HND):
        raise ValueError(f"layout {layout} is neither {_NHD} (NHD) nor {_HND} (HND)")
    return x.swapaxes(-3, -2) if layout == _HND else x


def gathered(cache: Array, indices: Array, start: int, length: int) -> Array:
    """`length` tokens from a cache's pages, which begin at `indices[start]`."""
    page_size = cache.shape[1]
    pages = indices[start : start + -(-length // page_size)]
    wrong = pages[(pages < 0) | (pages >= len(cache))]
    if len(wrong):
        raise ValueError(f"page {wrong[0]} of a cache that has {len(cache)}")
    if len(pages) * page_size < length:
        raise ValueError(f"{len(pages)} pages of {page_size} tokens for {length} tokens")
    return cache[pages].reshape(-1, *cache.shape[2:])[:length]


def lengths(indptr: Array, last_page_len: Array, page_size: int) -> Array:
    """Tokens of each request: those of its full pages and of its last."""
    pages = np.diff(indptr)
    return np.where(pages > 0, (pages - 1) * page_size + last_page_len[: len(pages)], 0)
