"""Prefill: many queries a request, one request or a batch."""

from __future__ import annotations

from dataclasses import replace

from fi_ffi.ops.attention.rows.arguments import (
    CAUSAL,
    F16,
    FA2_SCALARS,
    FP8,
    HEAD_DIMS,
    LSE,
    MASK_MODE,
    OUT,
    OUT_FA2,
    PAGED_K,
    PAGED_V,
    PAGES,
    PAIR,
    PDL,
    SIZES,
    SLOPES,
    SM_SCALE,
    SOFT_CAP,
    WINDOW,
    WORKSPACE,
    Dtypes,
    index,
    maybe,
    number,
    plan,
    row,
)
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import Arg, KvLayout, PlanInfo, Row, Tensor

_Forms = tuple[Row, ...]

_SAME: Dtypes = {"Q": F16, "KV": F16, "O": F16}
_DTYPES: dict[str, Dtypes] = {
    "fa2": {"Q": F16, "KV": F16 + FP8, "O": F16},
    "fa3": _SAME,
    "fa3_fp8": {"Q": FP8, "KV": FP8, "O": F16},
}

_Q = Tensor("q", "nnz_qo num_qo_heads head_dim_qk", "Q", "queries")
_K = Tensor("k", "nnz_kv num_kv_heads head_dim_qk", "KV", "keys", kv=True)
_V = Tensor("v", "nnz_kv num_kv_heads head_dim_vo", "KV", "values", kv=True)
_QO_INDPTR = index("qo_indptr", "b+1", "where each request's queries start")

_MULTI_ITEM = (
    maybe("maybe_prefix_len_ptr", "b", "uint32", "tokens of each request's prefix"),
    maybe("maybe_token_pos_in_items_ptr", "num_positions", "uint16",
          "each token's place in its item"),
    maybe("maybe_max_item_len_ptr", "b", "uint16", "tokens of each request's longest item"),
)  # fmt: skip
_ITEMS_LEN = number("token_pos_in_items_len", "positions for each request", int)
_BLOCK_SCALES = (
    maybe("maybe_k_cache_sf", "num_k_sf", "uint8", "block scales of NVFP4 keys", "0.6.10"),
    maybe("maybe_v_cache_sf", "num_v_sf", "uint8", "block scales of NVFP4 values", "0.6.10"),
)


def _scale(of: str, heads: str) -> Tensor:
    return maybe(f"maybe_scale_{of}", heads, "float32", f"scale of each head of {of}")


_SCALE_V = _scale("v", "num_kv_heads")
_SCALES = (_scale("q", "num_qo_heads"), _scale("k", "num_kv_heads"), _SCALE_V)
_SCALARS = tuple(number(f"scale_{of}_scalar", f"scale of {of}") for of in "qkv")

# What modules.py adds, by kernel.
_MASK = maybe("maybe_custom_mask", "mask_bytes", "uint8", "the packed mask")
_MASK_INDPTR = maybe("maybe_mask_indptr", "b+1", "int32", "where each request's mask starts")
_SINGLE: dict[str, tuple[Arg, ...]] = {
    "fa2": (_MASK, SLOPES, *_BLOCK_SCALES, *FA2_SCALARS),
    "fa3": (_SCALE_V, SOFT_CAP, SM_SCALE, _SCALARS[2]),
    "fa3_fp8": (*_SCALES, SM_SCALE, *_SCALARS),
}
_BATCH: dict[str, tuple[Arg, ...]] = {
    "fa2": (_MASK, _MASK_INDPTR, SLOPES, *_MULTI_ITEM, *_BLOCK_SCALES, *FA2_SCALARS, _ITEMS_LEN),
    "fa3": (*_MULTI_ITEM, _SCALE_V, SOFT_CAP, SM_SCALE, _SCALARS[2], _ITEMS_LEN),
    "fa3_fp8": (*_SCALES, SM_SCALE, *_SCALARS),
}
_SINK = (
    replace(maybe("sink", "num_qo_heads", "float32", "a logit of each head, part of the sum"),
            optional=False),
    SM_SCALE,
)  # fmt: skip

_FA3_PLAN = (
    index("qo_indptr", "b+1", "where each request's queries start", host=True),
    index("kv_indptr", "b+1", "where each request's pages (or tokens) start", host=True),
    index("kv_len_arr", "b", "tokens of each request", host=True),
    *SIZES, *HEAD_DIMS, CAUSAL, WINDOW,
)  # fmt: skip
_FA2_PLAN = (
    *_FA3_PLAN,
    number("fixed_split_size", "pages of each piece that a request is split in; -1: any", int),
    number("disable_split_kv", "whether requests are never split", bool),
    number("num_colocated_ctas", "blocks that another kernel takes", int),
    number(
        "uniform_q_len", "queries of every request, with CUDA graphs; 0: any", int, since="0.6.16"
    ),
)


def _source(family: str, kind: str) -> str:
    return f"{family}{'' if kind == 'fa2' else '_sm90'}_jit_binding.cu"


def _batch(family: str, kind: str, prefix: str, *args: Arg) -> tuple[_Forms, _Forms, _Forms]:
    """A batch-prefill family's rows: plan, ragged_run, paged_run."""
    source, dtypes = _source("batch_prefill", kind), _DTYPES[kind] if not prefix else _SAME
    variant = prefix + ("" if kind == "fa2" else f"_{kind}")
    out = OUT_FA2 if kind == "fa2" else OUT
    tail = (out, LSE, MASK_MODE, KvLayout(), WINDOW, PDL, *args)
    return (
        forms_of(plan(family, variant, source, *(_FA2_PLAN if kind == "fa2" else _FA3_PLAN))),
        forms_of(row(
            family, "ragged_run", variant, source, "Attention over keys and values side by side.",
            *WORKSPACE, PlanInfo(), _Q, _K, _V, _QO_INDPTR,
            index("kv_indptr", "b+1", "where each request's keys start"),
            *tail, dtypes=dtypes, nothing_axis="nnz_qo",
        )),
        forms_of(row(
            family, "paged_run", variant, source, "Attention over a paged cache.",
            *WORKSPACE, PlanInfo(), _Q, PAGED_K, PAGED_V, _QO_INDPTR, *PAGES,
            *tail, dtypes=dtypes, same_strides=PAIR, nothing_axis="nnz_qo",
        )),
    )  # fmt: skip


def _single(kind: str, *args: Arg) -> _Forms:
    return forms_of(row(
        "single_prefill", "run", "" if kind == "fa2" else f"_{kind}",
        _source("single_prefill", kind), "Attention of one request.", _Q, _K, _V,
        Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True),
        OUT_FA2 if kind == "fa2" else OUT, LSE, MASK_MODE, KvLayout(), WINDOW, *args,
        dtypes=_DTYPES[kind], nothing_axis="nnz_qo",
    ))  # fmt: skip


SINGLE = {kind: _single(kind, *args) for kind, args in _SINGLE.items()}
BATCH = {kind: _batch("batch_prefill", kind, "", *args) for kind, args in _BATCH.items()}
BATCH_SINK = {
    kind: _batch("batch_prefill_with_attention_sink", kind, "_sink", *_SINK)
    for kind in ("fa2", "fa3")
}
