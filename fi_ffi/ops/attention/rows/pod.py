"""The entry of FlashInfer's `pod` modules: a request's prefill and a batch's decode in one launch.

Both kinds of cache are handed over as NHD views, whatever their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.attention.rows.arguments import (
    FAR,
    HEADS,
    LSE,
    MASK_MODE,
    PAGED_K,
    PAGED_V,
    PAGES,
    PDL,
    SM_SCALE,
    SOFT_CAP,
    WINDOW,
    WORKSPACE,
    index,
    number,
    row,
)
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import Arg, PlanInfo, Tensor


def _of(part: str, *args: Arg) -> tuple[Arg, ...]:
    """Arguments of the prefill (p) or of the decode (d)."""
    return tuple(replace(arg, name=f"{arg.name}_{part}") for arg in args)


def _optional(name: str, axes: str, dtype: str, doc: str) -> Tensor:
    return Tensor(name, axes, dtype, doc, optional=True, contiguous=True)


_LAYOUT = number("layout", "0: tokens before heads", int)
_SLOPES = _optional("maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes: unused")
_NUMBERS = (
    SOFT_CAP, SM_SCALE, number("rope_rcp_scale", "1 / rope_scale"),
    number("rope_rcp_theta", "1 / rope_theta"),
)  # fmt: skip
_Q, _O = "qo_len num_qo_heads head_dim", "b num_qo_heads head_dim"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_PREFILL = (
    Tensor("q", _Q, "Q", "the request's queries"),
    Tensor("k", "kv_len num_kv_heads head_dim", "KV", "its keys"),
    Tensor("v", "kv_len num_kv_heads head_dim", "KV", "its values"),
    Tensor("tmp", "tmp_size", "uint8", "partial results", writes=True, reads=False, alignment=16),
    Tensor("o", _Q, "O", "its output", **_OUT),
    replace(LSE, axes="qo_len num_qo_heads"),
    MASK_MODE,
    _LAYOUT,
    WINDOW,
    _optional("maybe_custom_mask", "mask_bytes", "uint8", "which keys each query sees"),
    _SLOPES,
    *_NUMBERS,
)
_DECODE = (
    Tensor("q", _O, "Q", "a query of each request"),
    replace(PAGED_K, axes="num_pages page_size num_kv_heads head_dim", kv=False),
    replace(PAGED_V, axes="num_pages page_size num_kv_heads head_dim", kv=False),
    index("qo_indptr", "b+1", "where each request's query is"),
    *PAGES,
    Tensor("o", _O, "O", "their outputs", **_OUT),
    replace(LSE, axes="b num_qo_heads"),
    MASK_MODE,
    _LAYOUT,
    WINDOW,
    _optional("maybe_custom_mask", "d_mask_bytes", "uint8", "unused"),
    _optional("maybe_mask_indptr", "d_mask_indptr", "int32", "unused"),
    _SLOPES,
    *_NUMBERS,
)
POD = forms_of(
    row(
        "pod", "pod_with_kv_cache_tensor", "", "pod_jit_binding.cu",
        "A request's prefill and a batch's decode in one launch.",
        *_of("p", *_PREFILL), *_of("d", *WORKSPACE), PlanInfo(), *_of("d", *_DECODE), PDL,
        same_strides=("paged_k_cache_d", "paged_v_cache_d"), offset_limit=FAR,
        requires=(*HEADS, "qo_len >= 1", "kv_len >= 1", "b >= 1"),
    )
)  # fmt: skip
