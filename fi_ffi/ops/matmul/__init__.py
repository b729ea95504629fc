"""Matrix products that need something done around their kernel's entry: docs/gemm.md."""

from __future__ import annotations

from fi_ffi.ops.matmul.algos import bmm_fp8_get_algos, bmm_fp8_run_with_algo
from fi_ffi.ops.matmul.blockscale import (
    fp8_blockscale_gemm_sm90,
    fp8_blockscale_gemm_workspace_size,
)
from fi_ffi.ops.matmul.entries import settle as settle
from fi_ffi.ops.matmul.groupwise import gemm_fp8_nt_groupwise, group_gemm_fp8_nt_groupwise
from fi_ffi.ops.matmul.segment import segment_gemm
from fi_ffi.ops.matmul.tiny import tinygemm_bf16

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
