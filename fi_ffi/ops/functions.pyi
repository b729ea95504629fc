"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.call.op import Op

OPS: dict[str, Op]

class _rmsnorm(Op):
    def __call__(
        self, out: TensorLike, input: TensorLike, weight: TensorLike, eps: float = 1e-06,
        enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
rmsnorm: _rmsnorm
qk_rmsnorm: _rmsnorm
gemma_rmsnorm: _rmsnorm

class _fused_add_rmsnorm(Op):
    def __call__(
        self, input: TensorLike, residual: TensorLike, weight: TensorLike, eps: float = 1e-06,
        enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
fused_add_rmsnorm: _fused_add_rmsnorm
gemma_fused_add_rmsnorm: _fused_add_rmsnorm

class _rmsnorm_quant(Op):
    def __call__(
        self, out: TensorLike, input: TensorLike, weight: TensorLike, scale: TensorLike,
        eps: float = 1e-06, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
rmsnorm_quant: _rmsnorm_quant

class _fused_add_rmsnorm_quant(Op):
    def __call__(
        self, out: TensorLike, input: TensorLike, residual: TensorLike, weight: TensorLike,
        scale: TensorLike, eps: float = 1e-06, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
fused_add_rmsnorm_quant: _fused_add_rmsnorm_quant

class _layernorm(Op):
    def __call__(
        self, out: TensorLike, input: TensorLike, gamma: TensorLike, beta: TensorLike,
        eps: float = 1e-06, *, stream: object = None,
    ) -> None: ...
layernorm: _layernorm

class _fused_qk_rmsnorm_rope(Op):
    def __call__(
        self, qkv_in: TensorLike, q_weight: TensorLike, k_weight: TensorLike, q_out: TensorLike,
        k_out: TensorLike, v_out: TensorLike, num_tokens: int | None = None, seq_len: int = ...,
        ppf: int = ..., pph: int = ..., ppw: int = ..., num_frame_channels: int = ...,
        num_height_channels: int = ..., num_width_channels: int = ...,
        num_heads_q: int | None = None, num_heads_k: int | None = None,
        num_heads_v: int | None = None, head_dim: int | None = None, eps: float = 1e-06,
        base: float = 10000.0, interleave: bool = True, factor: float = 1.0, low: float = 0.0,
        high: float = 0.0, attention_factor: float = 1.0, is_qk_norm: bool = True,
        output_fp8: bool = False, output_quant_scale: float = 1.0, v_quant_scale: float = 1.0, *,
        stream: object = None,
    ) -> None: ...
fused_qk_rmsnorm_rope: _fused_qk_rmsnorm_rope

class _fused_dit_gate_residual_layernorm_gamma_beta(Op):
    def __call__(
        self, input: TensorLike, residual: TensorLike, gate: TensorLike,
        gate_bias: TensorLike | None = None, gamma: TensorLike = ..., beta: TensorLike = ...,
        residual_out: TensorLike = ..., norm_out: TensorLike = ...,
        input_sf_scale: TensorLike | None = None, epsilon: float = 1e-06, *, stream: object = None,
    ) -> None: ...
fused_dit_gate_residual_layernorm_gamma_beta: _fused_dit_gate_residual_layernorm_gamma_beta

class _fused_dit_residual_layernorm_scale_shift(Op):
    def __call__(
        self, input: TensorLike, residual: TensorLike | None = None, scale: TensorLike = ...,
        scale_bias: TensorLike | None = None, shift: TensorLike = ...,
        shift_bias: TensorLike | None = None, residual_out: TensorLike = ...,
        norm_out: TensorLike = ..., input_sf_scale: TensorLike | None = None,
        epsilon: float = 1e-06, *, stream: object = None,
    ) -> None: ...
fused_dit_residual_layernorm_scale_shift: _fused_dit_residual_layernorm_scale_shift

class _fused_dit_gate_residual_layernorm_scale_shift(Op):
    def __call__(
        self, input: TensorLike, residual: TensorLike, gate: TensorLike,
        gate_bias: TensorLike | None = None, scale: TensorLike = ...,
        scale_bias: TensorLike | None = None, shift: TensorLike = ...,
        shift_bias: TensorLike | None = None, residual_out: TensorLike = ...,
        norm_out: TensorLike = ..., input_sf_scale: TensorLike | None = None,
        epsilon: float = 1e-06, *, stream: object = None,
    ) -> None: ...
fused_dit_gate_residual_layernorm_scale_shift: _fused_dit_gate_residual_layernorm_scale_shift

class _silu_and_mul(Op):
    def __call__(
        self, out: TensorLike, input: TensorLike, enable_pdl: bool = False, *,
        stream: object = None,
    ) -> None: ...
silu_and_mul: _silu_and_mul
gelu_and_mul: _silu_and_mul
gelu_tanh_and_mul: _silu_and_mul

class _apply_rope(Op):
    def __call__(
        self, q: TensorLike, k: TensorLike, q_rope: TensorLike, k_rope: TensorLike,
        indptr: TensorLike, offsets: TensorLike, rotary_dim: int | None = None,
        interleave: bool = False, rope_scale: float = 1.0, rope_theta: float = 10000.0, *,
        stream: object = None,
    ) -> None: ...
apply_rope: _apply_rope

class _apply_llama31_rope(Op):
    def __call__(
        self, q: TensorLike, k: TensorLike, q_rope: TensorLike, k_rope: TensorLike,
        indptr: TensorLike, offsets: TensorLike, rotary_dim: int | None = None,
        interleave: bool = False, rope_scale: float = 8.0, rope_theta: float = 500000.0,
        low_freq_factor: float = 1.0, high_freq_factor: float = 4.0,
        old_context_length: float = 8192.0, *, stream: object = None,
    ) -> None: ...
apply_llama31_rope: _apply_llama31_rope

class _apply_rope_pos_ids(Op):
    def __call__(
        self, q: TensorLike, k: TensorLike, q_rope: TensorLike, k_rope: TensorLike,
        pos_ids: TensorLike, rotary_dim: int | None = None, interleave: bool = False,
        rope_scale: float = 1.0, rope_theta: float = 10000.0, *, stream: object = None,
    ) -> None: ...
apply_rope_pos_ids: _apply_rope_pos_ids

class _apply_llama31_rope_pos_ids(Op):
    def __call__(
        self, q: TensorLike, k: TensorLike, q_rope: TensorLike, k_rope: TensorLike,
        pos_ids: TensorLike, rotary_dim: int | None = None, interleave: bool = False,
        rope_scale: float = 8.0, rope_theta: float = 500000.0, low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0, old_context_length: float = 8192.0, *, stream: object = None,
    ) -> None: ...
apply_llama31_rope_pos_ids: _apply_llama31_rope_pos_ids

class _apply_rope_pos_ids_cos_sin_cache(Op):
    def __call__(
        self, q: TensorLike, k: TensorLike, q_rope: TensorLike, k_rope: TensorLike,
        cos_sin_cache: TensorLike, pos_ids: TensorLike, interleave: bool = False, *,
        stream: object = None,
    ) -> None: ...
apply_rope_pos_ids_cos_sin_cache: _apply_rope_pos_ids_cos_sin_cache

class _rope_quantize(Op):
    def __call__(
        self, q_rope_in: TensorLike, k_rope_in: TensorLike, q_nope_in: TensorLike,
        k_nope_in: TensorLike, q_rope_out: TensorLike, k_rope_out: TensorLike,
        q_nope_out: TensorLike, k_nope_out: TensorLike, cos_sin_cache: TensorLike,
        pos_ids: TensorLike, quant_scale_q: float = 1.0, quant_scale_kv: float = 1.0,
        interleave: bool = False, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
rope_quantize: _rope_quantize

class _rope_quantize_append_paged_kv_cache(Op):
    def __call__(
        self, q_rope_in: TensorLike, k_rope_in: TensorLike, q_nope_in: TensorLike,
        k_nope_in: TensorLike, v_in: TensorLike, q_rope_out: TensorLike, q_nope_out: TensorLike,
        cos_sin_cache: TensorLike, pos_ids: TensorLike, k_cache: TensorLike, v_cache: TensorLike,
        kv_indices: TensorLike, kv_indptr: TensorLike, batch_indices: TensorLike,
        positions: TensorLike, kv_layout: Literal['NHD', 'HND'] = 'NHD',
        page_size: int | None = None, quant_scale_q: float = 1.0, quant_scale_kv: float = 1.0,
        interleave: bool = False, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
rope_quantize_append_paged_kv_cache: _rope_quantize_append_paged_kv_cache

class _rope_quantize_append_paged_mla_kv_cache(Op):
    def __call__(
        self, q_rope_in: TensorLike, k_rope_in: TensorLike, q_nope_in: TensorLike,
        k_nope_in: TensorLike, q_rope_out: TensorLike, q_nope_out: TensorLike,
        cos_sin_cache: TensorLike, pos_ids: TensorLike, ckv_cache: TensorLike,
        kpe_cache: TensorLike, kv_indices: TensorLike, kv_indptr: TensorLike,
        batch_indices: TensorLike, positions: TensorLike, page_size: int | None = None,
        quant_scale_q: float = 1.0, quant_scale_kv: float = 1.0, interleave: bool = False,
        enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
rope_quantize_append_paged_mla_kv_cache: _rope_quantize_append_paged_mla_kv_cache

class _nvfp4_quantize_append_paged_kv_cache_with_slot_mapping(Op):
    def __call__(
        self, append_key: TensorLike, append_value: TensorLike, slot_mapping: TensorLike,
        paged_k_cache: TensorLike, paged_v_cache: TensorLike, k_scale_cache: TensorLike,
        v_scale_cache: TensorLike, k_scale: TensorLike, v_scale: TensorLike,
        kv_layout: Literal['NHD', 'HND'] = 'NHD', *, stream: object = None,
    ) -> None: ...
nvfp4_quantize_append_paged_kv_cache_with_slot_mapping: _nvfp4_quantize_append_paged_kv_cache_with_slot_mapping

class _append_paged_kv_cache(Op):
    def __call__(
        self, append_key: TensorLike, append_value: TensorLike, batch_indices: TensorLike,
        positions: TensorLike, paged_k_cache: TensorLike, paged_v_cache: TensorLike,
        kv_indices: TensorLike, kv_indptr: TensorLike, kv_last_page_len: TensorLike,
        kv_layout: Literal['NHD', 'HND'] = 'NHD', *, stream: object = None,
    ) -> None: ...
append_paged_kv_cache: _append_paged_kv_cache

class _append_paged_mla_kv_cache(Op):
    def __call__(
        self, append_ckv: TensorLike, append_kpe: TensorLike, batch_indices: TensorLike,
        positions: TensorLike, ckv_cache: TensorLike, kpe_cache: TensorLike, kv_indices: TensorLike,
        kv_indptr: TensorLike, kv_last_page_len: TensorLike, *, stream: object = None,
    ) -> None: ...
append_paged_mla_kv_cache: _append_paged_mla_kv_cache

class _concat_mla_k(Op):
    def __call__(
        self, k: TensorLike, k_nope: TensorLike, k_rope: TensorLike, *, stream: object = None,
    ) -> None: ...
concat_mla_k: _concat_mla_k

class _gdn_prefill(Op):
    def __call__(
        self, output: TensorLike, output_state: TensorLike, q: TensorLike, k: TensorLike,
        v: TensorLike, cu_seqlens: TensorLike, input_state: TensorLike | None = None,
        alpha: TensorLike | None = None, beta: TensorLike | None = None, scale: float = 0.0,
        workspace_buffer: TensorLike | None = None, state_checkpoints: TensorLike | None = None,
        checkpoint_cu_starts: TensorLike | None = None, checkpoint_every_n_tokens: int = 0, *,
        stream: object = None,
    ) -> None: ...
gdn_prefill: _gdn_prefill

class _merge_state(Op):
    def __call__(
        self, v_a: TensorLike, s_a: TensorLike, v_b: TensorLike, s_b: TensorLike,
        v_merged: TensorLike, s_merged: TensorLike, *, stream: object = None,
    ) -> None: ...
merge_state: _merge_state

class _merge_state_in_place(Op):
    def __call__(
        self, v: TensorLike, s: TensorLike, v_other: TensorLike, s_other: TensorLike,
        mask: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
merge_state_in_place: _merge_state_in_place

class _merge_states(Op):
    def __call__(
        self, v: TensorLike, s: TensorLike, v_merged: TensorLike, s_merged: TensorLike, *,
        stream: object = None,
    ) -> None: ...
merge_states: _merge_states

class _bmm_fp8(Op):
    def __call__(
        self, A: TensorLike, B: TensorLike, D: TensorLike, A_scale: TensorLike, B_scale: TensorLike,
        workspace_buffer: TensorLike | None = None, cublas_handle: int = 0, *,
        stream: object = None,
    ) -> None: ...
bmm_fp8: _bmm_fp8

class _tinygemm2(Op):
    def __call__(
        self, input: TensorLike, weight: TensorLike, bias: TensorLike, output: TensorLike,
        use_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
tinygemm2: _tinygemm2

class _tinygemm2_nobias(Op):
    def __call__(
        self, input: TensorLike, weight: TensorLike, output: TensorLike, use_pdl: bool = False, *,
        stream: object = None,
    ) -> None: ...
tinygemm2_nobias: _tinygemm2_nobias

class _mm_M1_16_K7168_N256(Op):
    def __call__(
        self, mat_a: TensorLike, mat_b: TensorLike, out: TensorLike, launch_with_pdl: bool = True,
        *, stream: object = None,
    ) -> None: ...
mm_M1_16_K7168_N256: _mm_M1_16_K7168_N256
mm_M1_16_K7168_N128: _mm_M1_16_K7168_N256
mm_M1_16_K6144_N256: _mm_M1_16_K7168_N256

class _fp8_quantize_1x128(Op):
    def __call__(
        self, input: TensorLike, outValueE4M3: TensorLike, outScaleFP8SF: TensorLike,
        use_ue8m0: bool = False, *, stream: object = None,
    ) -> None: ...
fp8_quantize_1x128: _fp8_quantize_1x128

class _packbits(Op):
    def __call__(
        self, x: TensorLike, bitorder: Literal['big', 'little'] = 'big', y: TensorLike = ..., *,
        stream: object = None,
    ) -> None: ...
packbits: _packbits

class _segment_packbits(Op):
    def __call__(
        self, x: TensorLike, input_indptr: TensorLike, output_indptr: TensorLike,
        bitorder: Literal['big', 'little'] = 'big', y: TensorLike = ..., *, stream: object = None,
    ) -> None: ...
segment_packbits: _segment_packbits

class _nvfp4_kv_dequant(Op):
    def __call__(
        self, fp4_data: TensorLike, block_scales: TensorLike, global_scale: TensorLike,
        output: TensorLike, *, stream: object = None,
    ) -> None: ...
nvfp4_kv_dequant: _nvfp4_kv_dequant

class _block_scale_interleave(Op):
    def __call__(
        self, blockScale: TensorLike, interleavedBlockScale: TensorLike, *, stream: object = None,
    ) -> None: ...
block_scale_interleave: _block_scale_interleave

class _block_scale_interleave_reverse(Op):
    def __call__(
        self, blockScale: TensorLike, reversedBlockScale: TensorLike, *, stream: object = None,
    ) -> None: ...
block_scale_interleave_reverse: _block_scale_interleave_reverse

class _mxfp8_quantize(Op):
    def __call__(
        self, input: TensorLike, valMxFP8: TensorLike, scaleFP8SF: TensorLike,
        sfSwizzleLayout: int = 0, alignment: int = 32, enable_pdl: bool = False, *,
        stream: object = None,
    ) -> None: ...
mxfp8_quantize: _mxfp8_quantize

class _nvfp4_kv_quant(Op):
    def __call__(
        self, input: TensorLike, global_scale: TensorLike, fp4_output: TensorLike,
        block_scales: TensorLike, *, stream: object = None,
    ) -> None: ...
nvfp4_kv_quant: _nvfp4_kv_quant

class _fp4_quantize(Op):
    def __call__(
        self, input: TensorLike, globalScale: TensorLike | None = None, valueE2M1: TensorLike = ...,
        scaleFP8SF: TensorLike = ..., sfVecSize: int = 16, sfUseUE8M0: bool = False,
        isSfSwizzledLayout: bool = True, isSf8x4Layout: bool = False,
        isGlobalScaleInversed: bool = False, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
fp4_quantize: _fp4_quantize

class _fp4_batched_quantize(Op):
    def __call__(
        self, input: TensorLike, globalScale: TensorLike, valueE2M1: TensorLike,
        scaleFP8SF: TensorLike, *, stream: object = None,
    ) -> None: ...
fp4_batched_quantize: _fp4_batched_quantize

class _softmax(Op):
    def __call__(
        self, workspace_buffer: TensorLike | None = None, logits: TensorLike = ...,
        output: TensorLike = ..., maybe_temperature_arr: TensorLike | None = None,
        temperature_val: float = 1.0, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
softmax: _softmax

class _sampling_from_probs(Op):
    def __call__(
        self, probs: TensorLike, output: TensorLike, valid: TensorLike,
        maybe_indices: TensorLike | None = None, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
sampling_from_probs: _sampling_from_probs

class _sampling_from_logits(Op):
    def __call__(
        self, logits: TensorLike, output: TensorLike, maybe_indices: TensorLike | None = None,
        deterministic: bool = True, maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
sampling_from_logits: _sampling_from_logits

class _top_k_sampling_from_probs(Op):
    def __call__(
        self, probs: TensorLike, output: TensorLike, valid: TensorLike,
        maybe_indices: TensorLike | None = None, maybe_top_k_arr: TensorLike | None = None,
        top_k_val: int = 2147483647, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
top_k_sampling_from_probs: _top_k_sampling_from_probs

class _top_p_sampling_from_probs(Op):
    def __call__(
        self, probs: TensorLike, output: TensorLike, valid: TensorLike,
        maybe_indices: TensorLike | None = None, maybe_top_p_arr: TensorLike | None = None,
        top_p_val: float = 1.0, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
top_p_sampling_from_probs: _top_p_sampling_from_probs

class _min_p_sampling_from_probs(Op):
    def __call__(
        self, probs: TensorLike, output: TensorLike, valid: TensorLike,
        maybe_indices: TensorLike | None = None, maybe_min_p_arr: TensorLike | None = None,
        min_p_val: float = 0.0, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
min_p_sampling_from_probs: _min_p_sampling_from_probs

class _top_k_top_p_sampling_from_probs(Op):
    def __call__(
        self, probs: TensorLike, output: TensorLike, valid: TensorLike,
        maybe_indices: TensorLike | None = None, maybe_top_k_arr: TensorLike | None = None,
        top_k_val: float = 2147483647.0, maybe_top_p_arr: TensorLike | None = None,
        top_p_val: float = 1.0, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
top_k_top_p_sampling_from_probs: _top_k_top_p_sampling_from_probs

class _top_p_renorm_probs(Op):
    def __call__(
        self, probs: TensorLike, renorm_probs: TensorLike,
        maybe_top_p_arr: TensorLike | None = None, top_p_val: float = 4.0,
        is_deterministic: bool = True, workspace: TensorLike | None = None, *,
        stream: object = None,
    ) -> None: ...
top_p_renorm_probs: _top_p_renorm_probs

class _top_k_renorm_probs(Op):
    def __call__(
        self, probs: TensorLike, renorm_probs: TensorLike,
        maybe_top_k_arr: TensorLike | None = None, top_k_val: int = 2147483647,
        row_states_buffer: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
top_k_renorm_probs: _top_k_renorm_probs

class _top_k_mask_logits(Op):
    def __call__(
        self, logits: TensorLike, mask_logits: TensorLike,
        maybe_top_k_arr: TensorLike | None = None, top_k_val: int = 2147483647,
        row_states_buffer: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
top_k_mask_logits: _top_k_mask_logits

class _chain_speculative_sampling(Op):
    def __call__(
        self, draft_probs: TensorLike, draft_token_ids: TensorLike, target_probs: TensorLike,
        output_token_ids: TensorLike, output_accepted_token_num: TensorLike,
        output_emitted_draft_token_num: TensorLike, deterministic: bool = True,
        maybe_seed_arr: TensorLike | None = None, seed_val: int = 0,
        maybe_offset_arr: TensorLike | None = None, offset_val: int = 0, *, stream: object = None,
    ) -> None: ...
chain_speculative_sampling: _chain_speculative_sampling

class _radix_topk(Op):
    def __call__(
        self, input: TensorLike, output_indices: TensorLike, output_values: TensorLike,
        maybe_row_states_buffer: TensorLike | None = None, top_k: int | None = None,
        sorted_output: bool = False, deterministic: bool = False, tie_break: int = 0,
        dsa_graph_safe: bool = False, *, stream: object = None,
    ) -> None: ...
radix_topk: _radix_topk

class _radix_topk_page_table_transform(Op):
    def __call__(
        self, input: TensorLike, output_page_table: TensorLike, src_page_table: TensorLike,
        maybe_row_to_batch: TensorLike | None = None, lengths: TensorLike = ...,
        maybe_row_states_buffer: TensorLike | None = None, top_k: int | None = None,
        deterministic: bool = False, tie_break: int = 0, dsa_graph_safe: bool = False,
        maybe_row_starts: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
radix_topk_page_table_transform: _radix_topk_page_table_transform

class _radix_topk_ragged_transform(Op):
    def __call__(
        self, input: TensorLike, output_indices: TensorLike, offsets: TensorLike,
        lengths: TensorLike, maybe_row_states_buffer: TensorLike | None = None,
        top_k: int | None = None, deterministic: bool = False, tie_break: int = 0,
        dsa_graph_safe: bool = False, maybe_row_starts: TensorLike | None = None, *,
        stream: object = None,
    ) -> None: ...
radix_topk_ragged_transform: _radix_topk_ragged_transform

class _fused_topk_deepseek(Op):
    def __call__(
        self, scores: TensorLike, bias: TensorLike, n_group: int, topk_group: int, topk: int,
        routed_scaling_factor: float, topk_values: TensorLike, topk_indices: TensorLike,
        launch_with_pdl: bool = False, routing_replay_out: TensorLike | None = None, *,
        stream: object = None,
    ) -> None: ...
fused_topk_deepseek: _fused_topk_deepseek

class _seq_chunk_cumsum(Op):
    def __call__(
        self, seq_idx: TensorLike, chunk_indices: TensorLike, chunk_offsets: TensorLike,
        output: TensorLike, tile_state: TensorLike | None = None, chunk_size: int = ...,
        num_logical_chunks: int | None = None, num_seqs: int | None = None, *,
        stream: object = None,
    ) -> None: ...
seq_chunk_cumsum: _seq_chunk_cumsum

class _fp4_gemm(Op):
    def __call__(
        self, mat1: TensorLike, mat2: TensorLike, mat1Scale: TensorLike, mat2Scale: TensorLike,
        globalScale: TensorLike, out: TensorLike, workspace_buffer: TensorLike | None = None,
        tactic: int = -1, *, stream: object = None,
    ) -> None: ...
fp4_gemm: _fp4_gemm

class _mxfp8_gemm(Op):
    def __call__(
        self, mat1: TensorLike, mat2: TensorLike, mat1Scale: TensorLike, mat2Scale: TensorLike,
        out: TensorLike, workspace_buffer: TensorLike | None = None, tactic: int = -1, *,
        stream: object = None,
    ) -> None: ...
mxfp8_gemm: _mxfp8_gemm
bmm_mxfp8: _mxfp8_gemm

class _bf16_gemm(Op):
    def __call__(
        self, mat1: TensorLike, mat2: TensorLike, out: TensorLike,
        workspace_buffer: TensorLike | None = None, tactic: int = -1, *, stream: object = None,
    ) -> None: ...
bf16_gemm: _bf16_gemm
bmm_bf16: _bf16_gemm

class _tgv_gemm(Op):
    def __call__(
        self, mat1: TensorLike, mat2: TensorLike, bias: TensorLike | None = None, tactic: int = -1,
        out: TensorLike = ..., pdl: bool = False, *, stream: object = None,
    ) -> None: ...
tgv_gemm: _tgv_gemm

class _moe_wna16_marlin_gemm_bf16(Op):
    def __call__(
        self, a: TensorLike, c: TensorLike, b_q_weight: TensorLike, b_scales: TensorLike,
        workspace: TensorLike | None = None, sorted_token_ids: TensorLike = ...,
        expert_ids: TensorLike = ..., num_tokens_post_padded: TensorLike = ...,
        topk_weights: TensorLike = ..., c_tmp: TensorLike | None = None, moe_block_size: int = ...,
        mul_topk_weights: bool = False, *, stream: object = None,
    ) -> None: ...
moe_wna16_marlin_gemm_bf16: _moe_wna16_marlin_gemm_bf16
moe_wna16_marlin_gemm_bf16_ep: _moe_wna16_marlin_gemm_bf16
moe_wna16_marlin_gemm_bf16_uint4b8: _moe_wna16_marlin_gemm_bf16
moe_wna16_marlin_gemm_bf16_ep_uint4b8: _moe_wna16_marlin_gemm_bf16

class _gptq_marlin_repack(Op):
    def __call__(
        self, out: TensorLike, b_q_weight: TensorLike, perm: TensorLike | None = None,
        num_bits: int = ..., *, stream: object = None,
    ) -> None: ...
gptq_marlin_repack: _gptq_marlin_repack

class _moe_align_block_size(Op):
    def __call__(
        self, topk_ids: TensorLike, num_experts: int, block_size: int, sorted_token_ids: TensorLike,
        expert_ids: TensorLike, num_tokens_post_pad: TensorLike,
        cumsum_buffer: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
moe_align_block_size: _moe_align_block_size

class _softmax_topk_flash(Op):
    def __call__(
        self, input: TensorLike, correction_bias: TensorLike, topk_indices: TensorLike,
        topk_weights: TensorLike, num_experts_real: int, scaling_factor: float,
        renormalize: bool = False, enable_pdl: bool = False, *, stream: object = None,
    ) -> None: ...
softmax_topk_flash: _softmax_topk_flash

class _softplus_sqrt_topk_flash(Op):
    def __call__(
        self, input: TensorLike, correction_bias: TensorLike, topk_indices: TensorLike,
        topk_weights: TensorLike, routed_scaling_factor: float, *, stream: object = None,
    ) -> None: ...
softplus_sqrt_topk_flash: _softplus_sqrt_topk_flash

class _hash_softplus_sqrt_topk_flash(Op):
    def __call__(
        self, input: TensorLike, input_ids: TensorLike, hash_indices_table: TensorLike,
        topk_indices: TensorLike, topk_weights: TensorLike, routed_scaling_factor: float, *,
        stream: object = None,
    ) -> None: ...
hash_softplus_sqrt_topk_flash: _hash_softplus_sqrt_topk_flash

class _transfer_kv_per_layer(Op):
    def __call__(
        self, src_k: TensorLike, dst_k: TensorLike, src_v: TensorLike, dst_v: TensorLike,
        src_indices: TensorLike, dst_indices: TensorLike, block_quota: int = 2,
        num_warps_per_block: int = 32, *, stream: object = None,
    ) -> None: ...
transfer_kv_per_layer: _transfer_kv_per_layer

class _transfer_kv_per_layer_mla(Op):
    def __call__(
        self, src: TensorLike, dst: TensorLike, src_indices: TensorLike, dst_indices: TensorLike,
        block_quota: int = 2, num_warps_per_block: int = 32, *, stream: object = None,
    ) -> None: ...
transfer_kv_per_layer_mla: _transfer_kv_per_layer_mla

class _transfer_kv_per_layer_pf_lf(Op):
    def __call__(
        self, src_k: TensorLike, dst_k: TensorLike, src_v: TensorLike, dst_v: TensorLike,
        src_indices: TensorLike, dst_indices: TensorLike, layer_id: int, block_quota: int = 2,
        num_warps_per_block: int = 32, *, stream: object = None,
    ) -> None: ...
transfer_kv_per_layer_pf_lf: _transfer_kv_per_layer_pf_lf
transfer_kv_per_layer_ph_lf: _transfer_kv_per_layer_pf_lf

class _transfer_kv_per_layer_mla_pf_lf(Op):
    def __call__(
        self, src: TensorLike, dst: TensorLike, src_indices: TensorLike, dst_indices: TensorLike,
        layer_id: int, block_quota: int = 2, num_warps_per_block: int = 32, *,
        stream: object = None,
    ) -> None: ...
transfer_kv_per_layer_mla_pf_lf: _transfer_kv_per_layer_mla_pf_lf

class _fused_topk_topp_renorm(Op):
    def __call__(
        self, probs: TensorLike, top_ks: TensorLike, top_ps: TensorLike, out: TensorLike,
        workspace: TensorLike | None = None, *, stream: object = None,
    ) -> None: ...
fused_topk_topp_renorm: _fused_topk_topp_renorm
