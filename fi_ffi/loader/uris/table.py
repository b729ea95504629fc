"""The table of module names: a row for each family and range of releases.

Families with parameters are here; the modules whose names have none are in `plain.py`.
Read out of FlashInfer's `jit/` folder, and held against what its generators answer in
`tests/loader/test_uris.py`; docs/catalogue.md says what changed when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fi_ffi.loader.uris.kinds import Value
from fi_ffi.loader.uris.plain import PLAIN
from fi_ffi.loader.uris.row import Default, Params, Row, version_of

_ATTENTION = "flashinfer.jit.attention:"
_MODULES = "flashinfer.jit.attention.modules:"
_MAMBA = "flashinfer.jit.mamba."

_QKVO = "_dtype_q_{dtype_q:dtype}_dtype_kv_{dtype_kv:kv}_dtype_o_{dtype_o:dtype}"
_IDX = "_dtype_idx_{dtype_idx:idx}"
_DIMS = "_head_dim_qk_{head_dim_qk:size}_head_dim_vo_{head_dim_vo:size}"
_SWA = "_use_swa_{use_sliding_window:Flag}"
_FLAGS = _SWA + "_use_logits_cap_{use_logits_soft_cap:Flag}"
_POSENC = "_posenc_{pos_encoding_mode:posenc}"
_F16QK = "_f16qk_{use_fp16_qk_reduction:Flag}"


def _same_as_q(params: Params) -> Value:
    return params.get("dtype_q")


def _output(params: Params) -> Value:
    """As the query, unless that is fp8: then both f16 and bf16 are usual."""
    query = params.get("dtype_q")
    return query if query in ("f16", "bf16") else None


# What a parameter is where nothing is said: it is the same in every family that has it.
_DEFAULTS: dict[str, Default] = {
    "backend": "fa2",
    "dtype_kv": _same_as_q,
    "dtype_o": _output,
    "dtype_idx": "i32",
    "head_dim_vo": lambda params: params.get("head_dim_qk"),
    "head_dim_ckv": 512,  # the sizes of DeepSeek's MLA, the only ones FlashInfer has
    "head_dim_kpe": 64,
    "arc": "sm80",
    "use_profiler": False,
    "use_fp16_qk_reduction": False,
    "pos_encoding_mode": 0,
    "pos_encoding_mode_p": 0,
    "pos_encoding_mode_d": 0,
    "use_sliding_window": False,
    "use_sliding_window_p": False,
    "use_sliding_window_d": False,
    "use_logits_soft_cap": False,
    "use_logits_soft_cap_p": False,
    "use_logits_soft_cap_d": False,
    "module_surface": "full",
    # What FlashInfer builds ahead of time and loads first.  fa3 has one module for all strides.
    "paged_kv_stride_mode": lambda params: "equal" if params.get("backend") != "fa3" else "runtime",
    "kv_cache_dtype": lambda params: params.get("input_dtype"),
    "output_dtype": lambda params: params.get("input_dtype"),
    "q_seq_len": 1,
    "use_spec_dec": lambda params: params.get("q_seq_len") != 1,
    "use_ragged_q": False,
    "state_scale_dtype": None,
    "philox_rounds": 0,
    "enable_pdl": False,
    "ssu_arch": "",
}

# Kinds that took more values in later releases: since, until, and the kind in between.
_BY_RELEASE = {
    # NVFP4 keys and values: called after the tensor's dtype, then by a name of its own.
    "kv": (("", "0.6.10", "dtype"), ("0.6.10", "0.6.18", "kv_u8"), ("0.6.18", "", "kv_fp4")),
    "fp4_arch": (
        ("", "0.6.6", "fp4_arch"),
        ("0.6.6", "0.6.16", "fp4_arch_f"),
        ("0.6.16", "", "fp4_arch_107"),
    ),
}


def _no_such_stride_module(params: Params) -> str | None:
    mode, surface = params["paged_kv_stride_mode"], params["module_surface"]
    if params["backend"] == "fa3" and (mode, surface) != ("runtime", "full"):
        return "paged_kv_stride_mode='runtime' and module_surface='full' with fa3"
    if surface == "paged" and mode != "independent":
        return "paged_kv_stride_mode='independent' with module_surface='paged'"
    return None


def _no_such_xqa(params: Params) -> str | None:
    q_seq_len, ratio = params["q_seq_len"], params["head_group_ratio"]
    if params["use_spec_dec"] != (q_seq_len != 1):
        return "use_spec_dec exactly where q_seq_len is above 1"
    # Where the SM90 kernel has no instance for one query length, ragged queries change nothing.
    fits = isinstance(q_seq_len, int) and isinstance(ratio, int) and q_seq_len * ratio <= 32
    if params.get("use_ragged_q") and (q_seq_len == 1 or not fits):
        return "q_seq_len above 1, and q_seq_len * head_group_ratio up to 32, with use_ragged_q"
    return None


_XQA = (
    "xqa_input_{input_dtype:half}_kv_cache_{kv_cache_dtype:xqa_kv}_output_{output_dtype:dtype}"
    "_page_size_{page_size:size}_head_dim_{head_dim:size}_head_group_ratio_{head_group_ratio:size}"
    "_use_sliding_window_{use_sliding_window:Flag}_use_spec_dec_{use_spec_dec:Flag}"
    "_spec_q_seq_len_{q_seq_len:size}"
)
_SSU = (
    "selective_state_update_s_{state_dtype:ssu}_i_{input_dtype:ssu}_w_{weight_dtype:ssu}"
    "_a_{matrixA_dtype:ssu}_si_{stateIndex_dtype:ssu}_d_{dim:size}_ds_{dstate:size}"
    "_nt_{ntokens_mtp:size}"
)
_SSU_INDICES = "_cs_{cu_seqlens_dtype:ssu}_na_{num_accepted_tokens_dtype:ssu}"
_SCALE = "{state_scale_dtype:ssu_scale}{philox_rounds:philox}"
_SSU_ARCH = "{ssu_arch:ssu_arch}"
_SSU_GENERATOR = _MAMBA + "selective_state_update:gen_selective_state_update{ssu_arch}_module"
_CHECKPOINTING = (
    "checkpointing_ssu_s_{state_dtype:ssu}_i_{input_dtype:ssu}_dt_{dt_dtype:ssu}"
    "_w_{weight_dtype:ssu}_a_{matrixA_dtype:ssu}_si_{stateIndex_dtype:ssu}_d_{dim:size}"
    "_ds_{dstate:size}_np_{npredicted:size}_mw_{max_window:size}_hpg_{heads_per_group:size}"
)
_CHECKPOINTING_GENERATOR = _MAMBA + "checkpointing_ssu:gen_checkpointing_ssu_module"
_POD = (
    "pod_with_kv_cache" + _QKVO + "_head_dim_{head_dim:size}_posenc_p_{pos_encoding_mode_p:posenc}"
    "_use_swa_p_{use_sliding_window_p:Flag}_use_logits_cap_p_{use_logits_soft_cap_p:Flag}"
    "_posenc_d_{pos_encoding_mode_d:posenc}_use_swa_d_{use_sliding_window_d:Flag}"
    "_use_logits_cap_d_{use_logits_soft_cap_d:Flag}" + _IDX + _F16QK
)
_BATCH_ATTENTION = (
    "batch_attention_with_kv_cache" + _QKVO + _IDX + _DIMS + _POSENC
    + "_use_logits_soft_cap_{use_logits_soft_cap:flag}_use_profiler_{use_profiler:flag}"
)  # fmt: skip
_BATCH_MLA = (
    "batch_mla_attention" + _QKVO + _IDX + "_head_dim_ckv_{head_dim_ckv:size}"
    "_head_dim_kpe_{head_dim_kpe:size}_profiler_{use_profiler:Flag}"
)
_BATCH_PREFILL = "batch_prefill_with_kv_cache" + _QKVO + _IDX + _DIMS + _POSENC + _FLAGS + _F16QK
_BACKEND = "{backend:fa}"

_ROWS = (
    Row("single_decode", "single_decode_with_kv_cache" + _QKVO + _DIMS + _POSENC + _FLAGS,
        _ATTENTION + "gen_single_decode_module"),
    Row("batch_decode", "batch_decode_with_kv_cache" + _QKVO + _IDX + _DIMS + _POSENC + _FLAGS,
        _ATTENTION + "gen_batch_decode_module"),
    Row("single_prefill",
        "single_prefill_with_kv_cache" + _QKVO + _DIMS + _POSENC + _FLAGS + _F16QK + _BACKEND,
        _ATTENTION + "gen_single_prefill_module"),
    Row("batch_prefill", _BATCH_PREFILL + _BACKEND,
        _ATTENTION + "gen_batch_prefill_module", until="0.7.0"),
    Row("batch_prefill",
        _BATCH_PREFILL + _BACKEND + "{module_surface:surface}{paged_kv_stride_mode:stride}",
        _MODULES + "_gen_batch_prefill_module", since="0.7.0", refusal=_no_such_stride_module),
    # An underscore ends the name of fa2, and is doubled in that of fa3.
    Row("batch_prefill_with_attention_sink",
        "batch_prefill_with_attention_sink_kv_cache" + _QKVO + _IDX + _DIMS + _SWA + "_" + _BACKEND,
        _MODULES + "gen_batch_prefill_attention_sink_module", arguments={"pos_encoding_mode": 0}),
    Row("batch_prefill_with_bidirectional_ranges",
        "batch_prefill_with_bidirectional_ranges" + _QKVO + _IDX + _DIMS,
        _MODULES + "gen_batch_prefill_bidirectional_ranges_module", since="0.7.1"),
    Row("batch_mla", _BATCH_MLA + _BACKEND, _ATTENTION + "gen_batch_mla_module", until="0.7.0"),
    Row("batch_mla", _BATCH_MLA + "_planabi2" + _BACKEND, _ATTENTION + "gen_batch_mla_module",
        since="0.7.0"),
    # Its generator asks a GPU for its architecture: no name leads to it without one.
    Row("batch_decode_mla",
        "batch_decode_mla_with_kv_cache" + _QKVO + _IDX + "_head_dim_ckv{head_dim_ckv:size}"
        + _FLAGS + "_arc_{arc:mla_arc}", until="0.7.0"),
    Row("pod", _POD, _ATTENTION + "gen_pod_module"),
    Row("batch_pod", "batch_" + _POD, _MODULES + "gen_batch_pod_module"),
    Row("batch_attention", _BATCH_ATTENTION, _ATTENTION + "gen_batch_attention_module",
        until="0.7.1"),
    Row("batch_attention", _BATCH_ATTENTION + "{paged_kv_stride_mode:stride}",
        _MODULES + "_gen_batch_attention_module", since="0.7.1"),
    Row("fmha_v2",
        "trtllm_fmha_v2_{input_layout:fmha_layout}_{input_dtype:fmha_dtype}"
        "_{output_dtype:fmha_dtype}", _MODULES + "gen_fmha_v2_module", since="0.6.7"),
    Row("xqa", _XQA, "flashinfer.jit.xqa:gen_xqa_module", until="0.6.16", refusal=_no_such_xqa),
    Row("xqa", _XQA + "{use_ragged_q:ragged}", "flashinfer.jit.xqa:gen_xqa_module",
        since="0.6.16", refusal=_no_such_xqa),
    Row("xqa_mla",
        "xqa_mla_input_{input_dtype:xqa_mla}_kv_cache_{kv_cache_dtype:xqa_mla}_page_size_{page_size:size}"
        "_head_dim_{head_dim:size}_head_group_ratio_{head_group_ratio:size}"
        "_use_sliding_window_{use_sliding_window:Flag}", "flashinfer.jit.xqa:gen_xqa_module_mla",
        defaults={"head_dim": 576, "head_group_ratio": 128}),
    Row("fused_moe", "fused_moe_{arch:moe_arch}",
        "flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm{arch}_module"),
    Row("fp4_quantization", "fp4_quantization_{arch:fp4_arch}",
        "flashinfer.jit.fp4_quantization:gen_fp4_quantization_sm{arch}_module"),
    Row("rmsnorm_silu",
        "rmsnorm_silu_C{C:size}_{output_dtype:silu_out}_wm{warps_m:size}_cpr{ctas_per_row:size}"
        "_bpl{bytes_per_ldg:size}_cfg{kernel_cfg:count}_occ{occupancy:size}",
        "flashinfer.jit.rmsnorm_silu:gen_rmsnorm_silu_module", since="0.6.8"),
    Row("selective_state_update", _SSU + _SSU_ARCH, _SSU_GENERATOR, since="0.6.5", until="0.6.6"),
    Row("selective_state_update", _SSU + _SCALE + _SSU_ARCH, _SSU_GENERATOR,
        since="0.6.6", until="0.6.7"),
    Row("selective_state_update", _SSU + _SSU_INDICES + _SCALE + _SSU_ARCH, _SSU_GENERATOR,
        since="0.6.7"),
    Row("checkpointing_ssu", _CHECKPOINTING + _SCALE + "{enable_pdl:pdl}",
        _CHECKPOINTING_GENERATOR, since="0.6.12", until="0.7.0"),
    Row("checkpointing_ssu",
        _CHECKPOINTING + "_ng_{num_groups:size}" + _SCALE + "{enable_pdl:pdl}",
        _CHECKPOINTING_GENERATOR, since="0.7.0"),
)  # fmt: skip


def _later(one: str, other: str) -> str:
    return max(one, other, key=lambda text: version_of(text or "0"))


def _earlier(one: str, other: str) -> str:
    return min(one, other, key=lambda text: version_of(text or "9999"))


def _split(row: Row) -> Iterator[Row]:
    """The rows with what all families share: default values, and kinds that releases changed."""
    row = dataclasses.replace(row, defaults={**_DEFAULTS, **row.defaults})
    changed = [kind for kind in _BY_RELEASE if f":{kind}}}" in row.template]
    for since, until, kind in _BY_RELEASE[changed[0]] if changed else ():
        since, until = _later(row.since, since), _earlier(row.until, until)
        if not (since and until) or version_of(since) < version_of(until):
            template = row.template.replace(f":{changed[0]}}}", f":{kind}}}")
            yield dataclasses.replace(row, template=template, since=since, until=until)
    if not changed:
        yield row


ROWS: tuple[Row, ...] = (
    *(part for row in _ROWS for part in _split(row)),
    *(Row(name, name, generator, since, until) for name, since, until, generator in PLAIN),
)
