"""What FlashInfer calls things in the definitions that it publishes, by our rows.

From `flashinfer/trace/templates/` of 0.6.13; `tests/cli/test_trace.py` holds them against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Axis(NamedTuple):
    """A published axis: one whose size is part of the definition (`const`), or any (`var`)."""

    name: str
    is_const: bool = False
    # What the size is called in the definition's name; "" where it is not part of it.
    abbreviation: str | None = None


def _var(name: str) -> Axis:
    return Axis(name)


def _const(name: str, abbreviation: str | None = None) -> Axis:
    return Axis(name, True, abbreviation)


@dataclass(frozen=True)
class Published:
    """How a row's call is published.

    `axes` are by the row's words for them, in the order that they are published in; `inputs` and
    `outputs` give names to arguments that are called otherwise.  `numbers` are scalars that are
    inputs; the others are part of the definition.  Axes of `same` count as the other where their
    sizes are equal.  `planned` are tensors of the row's plan that are inputs as well.
    """

    op_type: str
    name: str
    api: str
    axes: Mapping[str, Axis]
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    planned: tuple[str, ...] = ()
    # The tensors that are inputs, where theirs is another order than the row's; the rest follow.
    order: tuple[str, ...] = ()


_ROWS = {"n": _var("batch_size"), "h": _const("hidden_size", "h")}
_HIDDEN = {"input": "hidden_states"}
_GATED = {"n": _var("num_tokens"), "2*d": _const("hidden_size", "h"), "d": _var("hidden_div_2")}
_STATES = {
    "n": _var("seq_len"), "num_index_sets": _var("num_states"),
    "num_heads": _const("num_heads", "h"), "head_dim": _const("head_dim", "d"),
}  # fmt: skip
_HEADS = {"num_qo_heads": _const("num_qo_heads", "h"), "num_kv_heads": _const("num_kv_heads", "kv")}
_HEAD_DIM = {"head_dim_qk": _const("head_dim", "d"), "head_dim_vo": _const("head_dim_vo", "vo")}
_ONE_DIM = {"head_dim_vo": "head_dim_qk"}
_PAGES = {
    "num_pages": _var("num_pages"), "page_size": _const("page_size", "ps"),
    "b+1": _var("len_indptr"), "num_indices": _var("num_kv_indices"),
}  # fmt: skip
_CACHE = {
    "paged_k_cache": "k_cache", "paged_v_cache": "v_cache", "paged_kv_indptr": "kv_indptr",
    "paged_kv_indices": "kv_indices", "paged_kv_last_page_len": "kv_last_page_len",
}  # fmt: skip
_ATTENDED = {"o": "output", "maybe_lse": "lse"}
_MLA_DIMS = {
    "num_heads": _const("num_qo_heads", "h"), "head_dim_ckv": _const("head_dim_ckv", "ckv"),
    "head_dim_kpe": _const("head_dim_kpe", "kpe"),
}  # fmt: skip


def _norm(name: str, outputs: Mapping[str, str], **inputs: str) -> Published:
    op_type = "layernorm" if name == "layernorm" else "rmsnorm"
    return Published(op_type, name, f"flashinfer.norm.{name}", _ROWS, _HIDDEN | inputs, outputs)


def _append(name: str, axes: Mapping[str, Axis]) -> Published:
    shared = {
        "num_pages": _var("num_pages"), "b": _var("batch_size"),
        "b+1": _var("batch_size_plus_1"), "num_indices": _var("num_kv_indices"),
    }  # fmt: skip
    axes = {"nnz": _var("nnz_kv"), **axes, **shared}
    return Published("page_append", name, f"flashinfer.page.{name}", axes)


def _state(name: str) -> Published:
    return Published("cascade_merge", name, f"flashinfer.cascade.{name}", _STATES)


def _gated(name: str) -> Published:
    api = f"flashinfer.activation.{name}"
    return Published("activation", name, api, _GATED, outputs={"out": "output"})


def _gqa(name: str, api: str, axes: Mapping[str, Axis], op_type: str = "gqa_paged") -> Published:
    return Published(op_type, name, api, axes, _CACHE, _ATTENDED, ("sm_scale",), _ONE_DIM)


def _mla(name: str, axes: Mapping[str, Axis], *planned: str) -> Published:
    api = "flashinfer.mla._core.BatchMLAPagedAttentionWrapper.run"
    order = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", *planned[:-1], "kv_indices")
    return Published("mla_paged", name, api, axes, _CACHE, _ATTENDED, ("sm_scale",),
                     planned=planned, order=order)  # fmt: skip


_PREFILL = "flashinfer.prefill.BatchPrefillWith{}KVCacheWrapper.run"
_OUT = {"out": "output"}

# By the row's name.
PUBLISHED: dict[str, Published] = {
    "rmsnorm": _norm("rmsnorm", _OUT),
    "gemma_rmsnorm": _norm("gemma_rmsnorm", _OUT),
    "fused_add_rmsnorm": _norm("fused_add_rmsnorm", {"input": "output"}),
    "gemma_fused_add_rmsnorm": _norm("gemma_fused_add_rmsnorm", {"input": "output"}),
    "rmsnorm_quant": _norm("rmsnorm_quant", {}),
    "fused_add_rmsnorm_quant": _norm("fused_add_rmsnorm_quant", {}),
    "layernorm": _norm("layernorm", _OUT, gamma="weight", beta="bias"),
    **{name: _gated(name) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")},
    **{name: _state(name) for name in ("merge_state", "merge_state_in_place", "merge_states")},
    "append_paged_kv_cache": _append("append_paged_kv_cache", {
        "num_kv_heads": _const("num_kv_heads", "kv"), "head_dim": _const("head_dim", "d"),
        "page_size": _const("page_size", "ps"),
    }),
    "append_paged_mla_kv_cache": _append("append_paged_mla_kv_cache", {
        "head_dim_ckv": _const("head_dim_ckv", "ckv"),
        "head_dim_kpe": _const("head_dim_kpe", "kpe"), "page_size": _var("page_size"),
    }),
    "gdn_prefill": Published(
        "gdn", "gdn_prefill", "flashinfer.gdn_prefill.chunk_gated_delta_rule",
        {
            "total_seq_len": _var("total_seq_len"), "num_seqs": _var("num_seqs"),
            "num_q_heads": _const("num_q_heads", "qk"), "num_k_heads": _const("num_k_heads", ""),
            "num_v_heads": _const("num_v_heads", "v"), "head_size": _const("head_size", "d"),
            "num_seqs+1": _var("len_cu_seqlens"),
        },
        # What the kernel is given of `a` and `b` are the gates that they make.
        {"input_state": "state", "alpha": "a", "beta": "b"},
        {"output_state": "new_state"}, ("scale",), {"num_sab_heads": "num_v_heads"},
        order=("q", "k", "v", "input_state", "alpha", "beta", "cu_seqlens"),
    ),
    "single_decode.run": Published(
        "single_decode", "single_decode", "flashinfer.decode.single_decode_with_kv_cache",
        {**_HEADS, **_HEAD_DIM, "nnz_kv": _var("kv_len")}, outputs=_ATTENDED, same=_ONE_DIM,
    ),
    "single_prefill.run": Published(
        "single_prefill", "single_prefill", "flashinfer.prefill.single_prefill_with_kv_cache",
        {**_HEADS, **_HEAD_DIM, "nnz_qo": _var("qo_len"), "nnz_kv": _var("kv_len")},
        outputs=_ATTENDED, same=_ONE_DIM,
    ),
    "batch_decode.run": _gqa(
        "gqa_paged_decode", "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper.run",
        {"b": _var("batch_size"), **_HEADS, **_HEAD_DIM, **_PAGES},
    ),
    "batch_prefill.paged_run": _gqa(
        "gqa_paged_prefill", _PREFILL.format("Paged"),
        {**_HEADS, **_HEAD_DIM, **_PAGES, "nnz_qo": _var("total_q"), "b": _var("batch_size")},
    ),
    "batch_prefill.ragged_run": _gqa(
        "gqa_ragged", _PREFILL.format("Ragged"),
        {**_HEADS, **_HEAD_DIM, "b+1": _var("len_indptr"), "nnz_qo": _var("total_q"),
         "nnz_kv": _var("total_kv")}, "gqa_ragged",
    ),
    "batch_mla.run": _mla(
        "mla_paged_prefill",
        {**_MLA_DIMS, **_PAGES, "nnz_qo": _var("total_q"), "b": _var("batch_size")},
        "qo_indptr", "kv_indptr", "kv_len",
    ),
}  # fmt: skip
# MLA where each request has one query.
MLA_DECODE = _mla(
    "mla_paged_decode",
    {"nnz_qo": _var("batch_size"), "b": _var("batch_size"), **_MLA_DIMS, **_PAGES},
    "kv_indptr", "kv_len",
)  # fmt: skip
