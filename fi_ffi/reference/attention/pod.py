"""The entry of the `pod` modules: what a prefill and a decode do, one after the other."""

from __future__ import annotations

from typing import Any

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention import batch, plan, single, variant
from fi_ffi.reference.attention.variant import Compiled

_PREFILL = 15  # arguments of the prefill


def pod_with_kv_cache_tensor(*values: Any, compiled: Compiled) -> None:
    """Windows are what the arguments say, as in the module that was compiled for them."""
    _prefill(*values[:_PREFILL])
    _decode(*values[_PREFILL:])


def _prefill(
    q: Array, k: Array, v: Array, tmp: Array, o: Array, lse: Array | None, mask_mode: int,
    layout: int, window_left: int, mask: Array | None, slopes: Array | None, *numbers: float,
) -> None:  # fmt: skip
    single.prefill(
        variant.fa2_single, q, k, v, tmp, o, lse, mask_mode, layout, window_left, mask, slopes,
        None, None, *numbers, compiled=Compiled(use_sliding_window=window_left >= 0),
    )  # fmt: skip


def _decode(
    float_workspace: Array, int_workspace: Array, info: Any, q: Array, k: Array, v: Array,
    qo_indptr: Array, kv_indptr: Array, indices: Array, last_page_len: Array, o: Array,
    lse: Array | None, mask_mode: int, layout: int, window_left: int, mask: Array | None,
    mask_indptr: Array | None, slopes: Array | None, soft_cap: float, sm_scale: float,
    rope_rcp_scale: float, rope_rcp_theta: float, enable_pdl: bool,
) -> None:  # fmt: skip
    batch.paged_run(
        plan.FA2, variant.fa2, float_workspace, int_workspace, info, q, k, v, qo_indptr,
        kv_indptr, indices, last_page_len, o, lse, mask_mode, layout, window_left, enable_pdl,
        mask, mask_indptr, slopes, None, None, None, None, None, soft_cap, sm_scale,
        rope_rcp_scale, rope_rcp_theta, 0,
        compiled=Compiled(use_sliding_window=window_left >= 0),
    )  # fmt: skip
