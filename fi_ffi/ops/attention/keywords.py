"""The keywords of the plan classes, for type checkers; `spec` has their defaults and checks.

A test holds them against each other.
"""

from __future__ import annotations

from typing import TypedDict


class _Size(TypedDict):
    num_qo_heads: int
    num_kv_heads: int


class _Options(TypedDict, total=False):
    q_data_type: object
    kv_data_type: object
    enable_cuda_graph: bool
    max_num_indices: int | None


class _Scores(_Options, total=False):
    o_data_type: object
    window_left: int
    logits_soft_cap: float
    pos_encoding_mode: str


class _Prefill(_Size):
    head_dim_qk: int


class PrefillKeywords(_Prefill, _Scores, total=False):
    """Of `BatchPrefillPlan`."""

    head_dim_vo: int | None
    page_size: int | None
    causal: bool
    use_fp16_qk_reduction: bool
    use_custom_mask: bool
    use_multi_item_scoring: bool
    use_attention_sink: bool
    backend: str
    fixed_split_size: int | None
    disable_split_kv: bool
    max_total_num_rows: int | None


class DecodeKeywords(_Size, _Scores):
    """Of `BatchDecodePlan`."""

    head_dim: int
    page_size: int


class _Mla(TypedDict):
    num_heads: int
    page_size: int


class MlaKeywords(_Mla, _Options, total=False):
    """Of `BatchMlaPlan`."""

    head_dim_ckv: int
    head_dim_kpe: int
    causal: bool
    backend: str
    max_total_num_rows: int | None
