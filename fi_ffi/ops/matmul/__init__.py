"""Matrix products that need more than one call of an entry: docs/gemm.md."""

from __future__ import annotations

from fi_ffi.ops.matmul.products import (
    bmm_fp8_get_algos,
    bmm_fp8_run_with_algo,
    fp8_blockscale_gemm_sm90,
    fp8_blockscale_gemm_workspace_size,
    gemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
    tinygemm_bf16,
)
from fi_ffi.ops.matmul.segment import segment_gemm

__all__ = [
    "bmm_fp8_get_algos",
    "bmm_fp8_run_with_algo",
    "fp8_blockscale_gemm_sm90",
    "fp8_blockscale_gemm_workspace_size",
    "gemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
    "segment_gemm",
    "tinygemm_bf16",
]
