"""Attention: plans of batches over paged and ragged keys, and what all plans share."""

from __future__ import annotations

from fi_ffi.ops.attention.decode import BatchDecodePlan
from fi_ffi.ops.attention.mla import BatchMlaPlan
from fi_ffi.ops.attention.plan import WorkspaceSize
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.workspace import Workspace

__all__ = [
    "BatchDecodePlan",
    "BatchMlaPlan",
    "BatchPrefillPlan",
    "Workspace",
    "WorkspaceSize",
]
