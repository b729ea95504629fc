"""The `page` module: finds the place of each new token, and copies the token there bit for bit."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import tokens_first
from fi_ffi.reference.formula import Inputs, Move


def places(
    requests: Array, positions: Array, indices: Array, indptr: Array, page_size: int
) -> tuple[Array, Array]:
    """Return the page of each token, and its entry in the page."""
    slots = indptr[requests].astype(np.int64) + positions // page_size
    return indices[slots], positions % page_size


def _appended(a: Inputs, new: str, cache: str, layout: str | int = "NHD") -> Array:
    """Return the cache with the new tokens in it."""
    after: Array = a[cache].copy()
    tokens = tokens_first(after, layout)
    indices, indptr = a["kv_indices"], a["kv_indptr"]
    where = places(a["batch_indices"], a["positions"], indices, indptr, tokens.shape[1])
    tokens[where] = a[new]
    return after


def append_paged_kv_cache(a: Inputs) -> dict[str, Array]:
    return {
        cache: _appended(a, new, cache, a["kv_layout"])
        for new, cache in (("append_key", "paged_k_cache"), ("append_value", "paged_v_cache"))
    }


def append_paged_mla_kv_cache(a: Inputs) -> dict[str, Array]:
    return {
        cache: _appended(a, new, cache)
        for new, cache in (("append_ckv", "ckv_cache"), ("append_kpe", "kpe_cache"))
    }


MOVES: dict[str, Move] = {
    "append_paged_kv_cache": append_paged_kv_cache,
    "append_paged_mla_kv_cache": append_paged_mla_kv_cache,
}
