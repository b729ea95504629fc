"""The `page` module in numpy: the place of each new token, and a copy to it.

Unlike `include/flashinfer/page.cuh`, it looks at the indices: on a GPU a wrong one
writes to another request's page, or past the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

_HND = 1


def _places(
    requests: Array, positions: Array, indices: Array, indptr: Array, page_size: int, pages: int
) -> tuple[Array, Array]:
    """The page of each token and its entry in it."""
    inside = (requests >= 0) & (requests < len(indptr) - 1) & (positions >= 0)
    if not inside.all():
        raise IndexError(f"token {int(np.argmin(inside))} is of no request or before its start")
    slots = indptr[requests].astype(np.int64) + positions // page_size
    inside = (slots >= 0) & (slots < indptr[requests + 1])
    if not inside.all():
        raise IndexError(f"token {int(np.argmin(inside))} is past its request's pages")
    page = indices[slots]
    inside = (page >= 0) & (page < pages)
    if not inside.all():
        raise IndexError(f"token {int(np.argmin(inside))} is in a page that the cache has not")
    return page, positions % page_size


def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    paged_k_cache: Array,
    paged_v_cache: Array,
    kv_indices: Array,
    kv_indptr: Array,
    kv_last_page_len: Array,
    layout: int,
) -> None:
    k, v = paged_k_cache, paged_v_cache
    if layout == _HND:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    place = _places(batch_indices, positions, kv_indices, kv_indptr, k.shape[1], len(k))
    k[place], v[place] = append_key, append_value


def append_paged_mla_kv_cache(
    append_ckv: Array,
    append_kpe: Array,
    batch_indices: Array,
    positions: Array,
    ckv_cache: Array,
    kpe_cache: Array,
    kv_indices: Array,
    kv_indptr: Array,
    kv_last_page_len: Array,
) -> None:
    size, pages = ckv_cache.shape[1], len(ckv_cache)
    place = _places(batch_indices, positions, kv_indices, kv_indptr, size, pages)
    ckv_cache[place], kpe_cache[place] = append_ckv, append_kpe


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "page": {
        kernel.__name__: kernel for kernel in (append_paged_kv_cache, append_paged_mla_kv_cache)
    },
}
