"""Attention: plans for batches, and calls for single requests."""

from __future__ import annotations

from fi_ffi.ops.attention.batch_attention import BatchAttentionPlan
from fi_ffi.ops.attention.batch_pod import BatchPodPlan
from fi_ffi.ops.attention.cascade import MultiLevelCascadePlan, SharedPrefixPlan
from fi_ffi.ops.attention.decode import BatchDecodePlan
from fi_ffi.ops.attention.masks import alibi_slopes, pack_custom_mask
from fi_ffi.ops.attention.mla import BatchMlaPlan
from fi_ffi.ops.attention.plan import WorkspaceSize
from fi_ffi.ops.attention.pod import PodPlan
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.single import (
    single_decode,
    single_decode_workspace_size,
    single_prefill,
    single_prefill_workspace_size,
)
from fi_ffi.ops.attention.sparse import (
    BlockSparseAttentionPlan,
    VariableBlockSparseAttentionPlan,
    pack_block_mask,
)
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.attention.xqa import xqa, xqa_mla

__all__ = [
    "BatchAttentionPlan",
    "BatchDecodePlan",
    "BatchMlaPlan",
    "BatchPodPlan",
    "BatchPrefillPlan",
    "BlockSparseAttentionPlan",
    "MultiLevelCascadePlan",
    "PodPlan",
    "SharedPrefixPlan",
    "VariableBlockSparseAttentionPlan",
    "Workspace",
    "WorkspaceSize",
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
