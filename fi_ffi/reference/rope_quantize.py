"""The quantising entries of the `rope` module in numpy, in float32 as its kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.rope import looked_up, rotated

_HND = 1


def _quantised(x: Array, scale: float, dtype: Any) -> Array:
    """Float32 values times the scale, rounded; beyond the dtype's range they are its largest."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    values: Array = np.clip(x.astype(np.float32) * np.float32(scale), -largest, largest)
    return values.astype(dtype)


def rope_quantize(
    q_rope_in: Array, k_rope_in: Array, q_nope_in: Array, k_nope_in: Array, q_rope_out: Array,
    k_rope_out: Array, q_nope_out: Array, k_nope_out: Array, cos_sin_cache: Array, pos_ids: Array,
    quant_scale_q: float, quant_scale_kv: float, interleave: bool, enable_pdl: bool,
) -> None:  # fmt: skip
    cos, sin = looked_up(cos_sin_cache, pos_ids)
    for rope_in, nope_in, rope_out, nope_out, scale in (
        (q_rope_in, q_nope_in, q_rope_out, q_nope_out, quant_scale_q),
        (k_rope_in, k_nope_in, k_rope_out, k_nope_out, quant_scale_kv),
    ):
        rope_out[...] = _quantised(
            rotated(rope_in, cos, sin, interleave), scale, rope_out.dtype
        )  # fmt: skip
        nope_out[...] = _quantised(nope_in, scale, nope_out.dtype)


def _places(
    requests: Array, positions: Array, indices: Array, indptr: Array, page_size: int, pages: int
) -> tuple[Array, Array]:
    """The page of each token and its entry in it; unlike the kernel, it looks at the indices."""
    first, end = indptr[:-1].astype(np.int64), indptr[1:]
    if (requests >= len(first)).any() or (positions < 0).any():
        raise IndexError("a token is of no request, or before its start")
    slots = first[requests] + positions // page_size
    if (slots >= end[requests]).any() or (slots >= len(indices)).any():
        raise IndexError("a token is past its request's pages")
    found = indices[slots]
    if (found < 0).any() or (found >= pages).any():
        raise IndexError("a token is in a page that the cache has not")
    return found, positions % page_size


def rope_quantize_append_paged_kv_cache(
    q_rope_in: Array, k_rope_in: Array, q_nope_in: Array, k_nope_in: Array, v_in: Array,
    q_rope_out: Array, q_nope_out: Array, cos_sin_cache: Array, pos_ids: Array, k_cache: Array,
    v_cache: Array, ckv_cache: Array, kpe_cache: Array, kv_indices: Array, kv_indptr: Array,
    batch_indices: Array, positions: Array, kv_layout: int, page_size: int,
    quant_scale_q: float, quant_scale_kv: float, interleave: bool, enable_pdl: bool,
) -> None:  # fmt: skip
    # Tokens of no request are padding.
    kept = batch_indices >= 0
    is_mla = not k_cache.size
    k, v = (k_cache, v_cache) if kv_layout != _HND or is_mla else (
        k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2)
    )  # fmt: skip
    requests, at = batch_indices[kept], positions[kept]
    pages = len(ckv_cache if is_mla else k)
    place = _places(requests, at, kv_indices, kv_indptr, page_size, pages)
    cos, sin = looked_up(cos_sin_cache, pos_ids[kept])
    dtype = q_rope_out.dtype
    rope = _quantised(rotated(k_rope_in[kept], cos, sin, interleave), quant_scale_kv, dtype)
    nope = _quantised(k_nope_in[kept], quant_scale_kv, dtype)
    if is_mla:
        kpe_cache[place], ckv_cache[place] = rope[:, 0], nope[:, 0]
    else:
        k[place] = np.concatenate([rope, nope], axis=-1)
        v[place] = _quantised(v_in[kept], quant_scale_kv, dtype)
    rope = _quantised(rotated(q_rope_in[kept], cos, sin, interleave), quant_scale_q, dtype)
    q_rope_out[kept] = rope
    q_nope_out[kept] = _quantised(q_nope_in[kept], quant_scale_q, dtype)


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "rope": {
        "rope_quantize": rope_quantize,
        "rope_quantize_append_paged_kv_cache": rope_quantize_append_paged_kv_cache,
    }
}
