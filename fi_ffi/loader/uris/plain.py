"""Modules whose name has no parameters: the name, the releases, and how to ask for it.

`since` and `until` are the first and the first no longer of the releases whose
generators know the name, "" for no limit among those looked at (0.6.3 to 0.7.2.post1).
The generator is there for what FlashInfer's own list of modules does not have in some
release; others are asked for through that list.
Blackwell-only modules that are many and named by hashes (from 0.6.18 on) are left out:
the catalogue shows them under their name.
"""

from __future__ import annotations

_GENERAL = (
    "cascade comm norm page quantization rope sampling spdlog topk trtllm_utils vllm_comm"
    " silu_and_mul gelu_and_mul gelu_tanh_and_mul"
)
_GEMM = (
    "gemm gemm_sm90 gemm_sm100 gemm_sm120"
    " fp4_gemm_cutlass fp4_gemm_cutlass_sm120 fp8_gemm_cutlass"
    " tgv_gemm_bf16 tgv_gemm_fp16 trtllm_gemm trtllm_low_latency_gemm"
)
_SM100 = (
    "fmha_cudnn_gen fmha_cutlass_sm100a fmha_gen mla mxfp8_quantization_sm100"
    " fused_moe_trtllm_sm100"
)
_GEMM_CORE = "flashinfer.jit.gemm.core:"
_COMM = "flashinfer.jit.comm:"
_DSV3 = "flashinfer.jit.dsv3_optimizations:"

Plain = tuple[str, str, str, str | None]


def _known(names: str, since: str = "", until: str = "") -> tuple[Plain, ...]:
    return tuple((name, since, until, None) for name in names.split())


PLAIN: tuple[Plain, ...] = (
    *_known(_GENERAL),
    *_known(_GEMM),
    *_known(_SM100),
    ("concat_mla", "", "", _DSV3 + "gen_concat_mla_module"),
    ("dsv3_router_gemm", "", "", _DSV3 + "gen_dsv3_router_gemm_module"),
    ("dsv3_fused_routing", "", "", _DSV3 + "gen_dsv3_fused_routing_module"),
    ("bf16_gemm_cutlass", "", "", _GEMM_CORE + "gen_gemm_sm100_module_cutlass_bf16"),
    ("fp4_gemm_cutlass_sm103", "", "", _GEMM_CORE + "gen_gemm_sm103_module_cutlass_fp4"),
    ("fp8_blockscale_gemm_90", "", "",
     "flashinfer.jit.gemm.fp8_blockscale:gen_fp8_blockscale_gemm_sm90_module"),
    ("trtllm_fmha_v2", "", "0.6.7",
     "flashinfer.jit.attention.modules:gen_trtllm_fmha_v2_module"),
    ("trtllm_fmha_v2", "0.6.7", "",
     "flashinfer.jit.attention.modules:gen_trtllm_fmha_v2_sm120_module"),
    ("trtllm_comm", "", "", _COMM + "gen_trtllm_comm_module"),
    ("trtllm_mnnvl_comm", "", "", _COMM + "gen_trtllm_mnnvl_comm_module"),
    ("mnnvl_moe_alltoall", "", "", _COMM + "gen_moe_alltoall_module"),
    ("tinygemm2", "0.6.5", "", "flashinfer.jit.tinygemm2:gen_tinygemm2_module"),
    ("mamba_seq_chunk_cumsum", "0.6.7", "",
     "flashinfer.jit.mamba.seq_chunk_cumsum:gen_seq_chunk_cumsum_module"),
    *_known("gdn_prefill_sm90", until="0.6.14"),  # CuTe-DSL only from then on
    *_known("mamba_selective_state_update mamba_selective_state_update_sm90"
            " mamba_selective_state_update_sm100", until="0.6.5"),
    *_known("moe_utils mxfp8_gemm_cutlass", since="0.6.4"),
    *_known("fp4_kv_dequant fp4_kv_quant", since="0.6.7"),
    *_known("mxfp8_gemm_cutlass_sm120", since="0.6.8"),
    ("dcp_alltoall", "0.6.10", "0.7.2", _COMM + "gen_dcp_alltoall_module"),
    *_known("mm_bf16_cublaslt", since="0.6.11"),
    ("api_log_stats", "0.6.12", "",
     "flashinfer.jit.api_log_stats:gen_api_log_stats_module"),
    *_known("bgmv_moe mhc", since="0.6.13"),
    *_known("nvfp4_attention_sm120 sparse_mla_sm120", since="0.6.14"),
    *_known("cute_sm120_mxfp8_groupwise", since="0.6.14", until="0.7.0"),
    *_known("hash_topk monomoe", since="0.6.15"),
    *_known("nvfp4_svdquant_gemm_cutlass", since="0.6.16"),
    *_known("cute_sm12x_gemm pcie_ipc_comm trtllm_gen_routing", since="0.7.0"),
    *_known("mnnvl_moe_alltoall_sm100a mnnvl_moe_alltoall_sm103a pcie_ipc_ag_rs"
            " blackwell_softmax", since="0.7.1"),
    *_known("dcp_alltoall_generated", since="0.7.2"),
    *_known("mla_kv_pack_fp8", since="0.7.2.post1"),
)  # fmt: skip
