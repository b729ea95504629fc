"""Keys and values of 4 bits: the same runs over their values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention import plan, runs
from fi_ffi.reference.attention.variant import fa2, fa2_single
from fi_ffi.reference.moe_weights import fp4

_BLOCK = 16
# The index of the keys' scales among the arguments that modules.py adds; the values' are next.
_OF_BATCH, _OF_ONE = 6, 2


def dequantised(packed: Array, scales: Array | None) -> Array:
    """Return the values of bytes [..., d / 2], the lower half first, times their block's scale
    [..., d / 16] in e4m3: exact in float16 and bfloat16."""
    if scales is None:
        raise ValueError("keys and values of 4 bits need maybe_k_cache_sf and maybe_v_cache_sf")
    of_each = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    made: Array = fp4(packed) * np.repeat(of_each, _BLOCK, -1)
    return made


def single_prefill(
    q: Array,
    k: Array,
    v: Array,
    tmp: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    *more: Any,
    compiled: Any,
) -> None:
    """single_prefill's `run`."""
    k, v = dequantised(k, more[_OF_ONE]), dequantised(v, more[_OF_ONE + 1])
    given = q, k, v, tmp, o, lse, mask_mode, layout, window_left, *more
    runs.single_prefill(fa2_single, *given, compiled=compiled)


def ragged_run(
    float_workspace: Array,
    int_workspace: Array,
    info: Any,
    q: Array,
    k: Array,
    v: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    enable_pdl: bool,
    *more: Any,
    compiled: Any,
) -> None:
    """`ragged_run`."""
    k, v = dequantised(k, more[_OF_BATCH]), dequantised(v, more[_OF_BATCH + 1])
    runs.ragged_run(
        plan.FA2,
        fa2,
        float_workspace,
        int_workspace,
        info,
        q,
        k,
        v,
        qo_indptr,
        kv_indptr,
        o,
        lse,
        mask_mode,
        layout,
        window_left,
        enable_pdl,
        *more,
        compiled=compiled,
    )


def paged_run(
    float_workspace: Array,
    int_workspace: Array,
    info: Any,
    q: Array,
    k: Array,
    v: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    indices: Array,
    last_page_len: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    enable_pdl: bool,
    *more: Any,
    compiled: Any,
) -> None:
    """`paged_run`."""
    k, v = dequantised(k, more[_OF_BATCH]), dequantised(v, more[_OF_BATCH + 1])
    runs.paged_run(
        plan.FA2,
        fa2,
        float_workspace,
        int_workspace,
        info,
        q,
        k,
        v,
        qo_indptr,
        kv_indptr,
        indices,
        last_page_len,
        o,
        lse,
        mask_mode,
        layout,
        window_left,
        enable_pdl,
        *more,
        compiled=compiled,
    )


def attention_run(
    float_workspace: Array,
    int_workspace: Array,
    info: Any,
    q: Array,
    k: Array,
    v: Array,
    *more: Any,
    compiled: Any,
) -> None:
    """batch_attention's `run`; the last arguments are the scales."""
    k, v = dequantised(k, more[-2]), dequantised(v, more[-1])
    given = float_workspace, int_workspace, info, q, k, v, *more[:-2], None, None
    runs.attention_run(*given, compiled=compiled)
