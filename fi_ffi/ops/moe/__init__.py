"""Mixtures of experts: `cutlass_fused_moe`, `FusedMoe`, and functions for 4-bit weights."""

from __future__ import annotations

from fi_ffi.ops.moe.deepgemm import set_deepgemm_jit_include_dirs
from fi_ffi.ops.moe.fused import FusedMoe, cutlass_fused_moe
from fi_ffi.ops.moe.lora import bgmv_moe
from fi_ffi.ops.moe.weights import (
    interleave_moe_scales_for_sm90_mixed_gemm,
    interleave_moe_weights_for_sm90_mixed_gemm,
)

__all__ = [
    "FusedMoe",
    "bgmv_moe",
    "cutlass_fused_moe",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "set_deepgemm_jit_include_dirs",
]
