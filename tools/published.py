"""What is called of tokenspeed-kernel's libraries on a GPU: by which test, or why not."""

from __future__ import annotations

import json

from fi_ffi.modules import files

RECORDS = json.loads(files._RECORDS.read_text())
SIGNATURES = {
    record["library"].rpartition(" ")[2]: record["functions"] for record in RECORDS.values()
}
# By entry, the test of tests/gpu/test_published.py, or of test_published_comm.py, that calls it.
CALLED = {
    "softmax": "test_softmax",
    "merge_state": "test_merge_state",
    "apply_rope": "test_rope", "apply_llama31_rope": "test_rope",
    "apply_rope_pos_ids": "test_rope", "apply_llama31_rope_pos_ids": "test_rope",
    "apply_rope_pos_ids_cos_sin_cache": "test_rope",
    "apply_rope_pos_ids_cos_sin_cache_fused": "test_rope_and_cache",
    "softmax_topk_flash": "test_routing", "softplus_sqrt_topk_flash": "test_routing",
    "hash_softplus_sqrt_topk_flash": "test_routing_by_a_table",
    "verify_chain_greedy": "test_chains", "chain_speculative_sampling_target_only": "test_chains",
    "transfer_kv_per_layer": "test_transfers", "transfer_kv_per_layer_mla": "test_transfers",
    "transfer_kv_all_layer": "test_transfers", "transfer_kv_all_layer_mla": "test_transfers",
    "transfer_kv_per_layer_pf_lf": "test_transfers",
    "transfer_kv_per_layer_mla_pf_lf": "test_transfers",
    "transfer_kv_all_layer_lf_pf": "test_transfers",
    "transfer_kv_all_layer_mla_lf_pf": "test_transfers",
    "transfer_kv_per_layer_ph_lf": "test_transfers_by_head",
    "transfer_kv_all_layer_lf_ph": "test_transfers_by_head",
    "fused_topk_topp_workspace_size": "test_topk_topp", "fused_topk_topp_renorm": "test_topk_topp",
    "silu_and_mul_fused_block_quant": "test_silu_quantized",
    "silu_and_mul_fused_block_quant_ep": "test_silu_quantized",
    "moe_finalize_fuse_shared": "test_finalize",
    "rmsnorm_fused_parallel": "test_two_norms",
    "lm_head_gemm": "test_logits", "dsv3_router_gemm": "test_router",
    "gptq_marlin_repack": "test_repack",
    "moe_align_block_size": "test_experts_in_4_bits",
    "moe_wna16_marlin_gemm_bf16": "test_experts_in_4_bits",
    "moe_wna16_marlin_gemm_bf16_ep": "test_experts_in_4_bits",
    "trtllm_lamport_initialize": "test_lamport", "trtllm_lamport_initialize_all": "test_lamport",
    "trtllm_allreduce_fusion": "test_all_reduce",
    "trtllm_allgather_fusion": "test_all_gather",
    "trtllm_reducescatter_fusion": "test_reduce_scatter",
    "mhc_big_fuse": "test_mixing_of_streams",
    "dsv4_persistent_topk": "test_best_of_a_step",
    "dsv4_indexer_topk_prefill": "test_best_of_a_prompt",
    "dsv4_gather_paged_indexer_mxfp4_cache": "test_pages_of_an_indexer",
    "fused_dsv4_qnorm_rope_kv_rope_quant_insert": "test_queries_and_latents",
}  # fmt: skip
# By entry, why no test calls it.
NOT_CALLED = {
    "silu_and_mul_fuse_nvfp4_quant": "of SM100 and later, by its caller",
    **dict.fromkeys(
        ("attn_res_fwd", "attn_res_fwd_out_norm"),
        "of Blackwell, by their caller",
    ),
    "rope_quantize": "it takes no fp8",
    "trtllm_mnnvl_allreduce_fusion": "it writes by NVLink multicast, which no test makes",
    "trtllm_custom_all_reduce": "the wheel's Python does not call it",
}  # fmt: skip
# What is called and gives wrong results, and for which arguments.
WRONG = {
    "fused_topk_topp_renorm": "with k from 129 on, p alone counts",
}
