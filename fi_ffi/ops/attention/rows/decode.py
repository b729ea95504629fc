"""Decoding: one query a request, without tensor cores."""

from __future__ import annotations

from dataclasses import replace

from fi_ffi.ops.attention.rows.arguments import (
    FA2_SCALARS,
    HEAD_DIMS,
    HEADS,
    LSE,
    OUT_FA2,
    PAGED_K,
    PAGED_V,
    PAGES,
    PAIR,
    PDL,
    SIZES,
    SLOPES,
    SOFT_CAP,
    WINDOW,
    WORKSPACE,
    index,
    plan,
    row,
)
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import KvLayout, PlanInfo, Tensor

# Query heads for each key head that the kernels were compiled for.
DECODE_GROUPS = (1, 2, 3, 4, 8)

_ADDED = (SLOPES, *FA2_SCALARS)
_K = Tensor("k", "nnz_kv num_kv_heads head_dim_qk", "KV", "keys", kv=True, contiguous=True)

SINGLE = forms_of(row(
    "single_decode", "run", "", "single_decode_jit_binding.cu", "Attention of one query.",
    Tensor("q", "num_qo_heads head_dim_qk", "Q", "the query", contiguous=True),
    _K, replace(_K, name="v", doc="values"),
    Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True),
    replace(OUT_FA2, axes="num_qo_heads head_dim_qk"), replace(LSE, axes="num_qo_heads"),
    KvLayout(strided=False), WINDOW, *_ADDED, requires=(*HEADS, "nnz_kv >= 1"),
))  # fmt: skip

BATCH_PLAN = forms_of(plan(
    "batch_decode", "", "batch_decode_jit_binding.cu",
    index("indptr", "b+1", "where each request's pages start", host=True),
    *SIZES[1:], WINDOW, SOFT_CAP, *HEAD_DIMS,
    Tensor("empty_q_data", "0", "uint8", "of the query's dtype", host=True),
    Tensor("empty_kv_data", "0", "uint8", "of the cache's dtype", host=True),
))  # fmt: skip

BATCH_RUN = forms_of(row(
    "batch_decode", "run", "", "batch_decode_jit_binding.cu", "Attention of a query a request.",
    *WORKSPACE, PlanInfo(),
    Tensor("q", "b num_qo_heads head_dim_qk", "Q", "queries"), PAGED_K, PAGED_V, *PAGES,
    replace(OUT_FA2, axes="b num_qo_heads head_dim_vo"), replace(LSE, axes="b num_qo_heads"),
    KvLayout(), WINDOW, PDL, *_ADDED, same_strides=PAIR, nothing_axis="b",
))  # fmt: skip
