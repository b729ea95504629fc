"""Attention above the core: cascades, POD, sparse plans, masks, XQA, calls of single requests."""

from __future__ import annotations

from fi_ffi.ops.plans.batch_attention import BatchAttentionPlan
from fi_ffi.ops.plans.batch_pod import BatchPodPlan
from fi_ffi.ops.plans.cascade import MultiLevelCascadePlan, SharedPrefixPlan
from fi_ffi.ops.plans.masks import alibi_slopes, pack_custom_mask
from fi_ffi.ops.plans.pod import PodPlan
from fi_ffi.ops.plans.single import (
    single_decode,
    single_decode_workspace_size,
    single_prefill,
    single_prefill_workspace_size,
)
from fi_ffi.ops.plans.sparse import (
    BlockSparseAttentionPlan,
    VariableBlockSparseAttentionPlan,
    pack_block_mask,
)
from fi_ffi.ops.plans.xqa import xqa, xqa_mla

__all__ = [
    "BatchAttentionPlan",
    "BatchPodPlan",
    "BlockSparseAttentionPlan",
    "MultiLevelCascadePlan",
    "PodPlan",
    "SharedPrefixPlan",
    "VariableBlockSparseAttentionPlan",
    "alibi_slopes",
    "pack_block_mask",
    "pack_custom_mask",
    "single_decode",
    "single_decode_workspace_size",
    "single_prefill",
    "single_prefill_workspace_size",
    "xqa",
    "xqa_mla",
]
