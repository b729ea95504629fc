"""Kernels in CuTe DSL that `fi-ffi build` makes, and the calls that make FlashInfer compile them.

They are not in FlashInfer's list of modules built ahead of time: FlashInfer compiles such a kernel
when it is called, for the shapes, dtypes and flags of the call. Therefore each family here is such
a call, and its options determine the kernel. `cute_driver.py` makes the call in the build
environment, without a GPU. A module takes the name under which FlashInfer caches the kernel, or a
name built from the options if FlashInfer does not cache it (`fi_ffi.catalogue.families`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fi_ffi.catalogue.families import KDA_FLAGS, Options
from fi_ffi.catalogue.requests import Request
from fi_ffi.loader.uris import DTYPES

Arguments = dict[str, Any]


def tensor(dtype: str, *shape: int, stride: int = 0) -> dict[str, object]:
    """Return a placeholder for any tensor with this dtype and these compiled sizes. With `stride`,
    that is the distance of the first axis, in elements."""
    document: dict[str, object] = {"tensor": DTYPES[dtype], "shape": list(shape)}
    return document | {"stride": stride} if stride else document


def _numbers(options: Options, *names: str) -> list[int]:
    return [int(options[name]) for name in names]


def _gdn_token(options: Options, batch: int, tokens: int, q_heads: int, v_heads: int) -> Arguments:
    return {
        "q": tensor("bf16", batch, tokens, q_heads, 128),
        "k": tensor("bf16", batch, tokens, q_heads, 128),
        "v": tensor("bf16", batch, tokens, v_heads, 128),
        "A_log": tensor("f32", v_heads),
        "a": tensor(options["a"], batch, tokens, v_heads),
        "dt_bias": tensor(options["dt_bias"], v_heads),
        "b": tensor(options["b"], batch, tokens, v_heads),
        "use_qk_l2norm": options["l2norm"] == "1",
    }


def _gdn_decode_keys_first(options: Options) -> Arguments:
    batch, q_heads, v_heads = _numbers(options, "batch", "q_heads", "v_heads")
    states = tensor("f32", batch, v_heads, 128, 128)
    return {**_gdn_token(options, batch, 1, q_heads, v_heads), "state": states}


def _gdn_decode(options: Options) -> Arguments:
    batch, tokens, q_heads, v_heads = _numbers(options, "batch", "tokens", "q_heads", "v_heads")
    state, index = options["state"], options["indices"]
    slots, stride = _numbers(options, "slots", "slot_stride")
    states = tensor(state, slots or batch, v_heads, 128, 128, stride=stride)
    arguments: Arguments = {
        **_gdn_token(options, batch, tokens, q_heads, v_heads),
        "state": None,
        "disable_state_update": options["update"] == "0",
        "backend": "flashinfer",
    }
    if options["pool"] == "0":
        return {**arguments, "state": states}
    arguments |= {"initial_state": states, "initial_state_indices": tensor(index, batch)}
    if options["split"] == "1":
        arguments["output_state_indices"] = tensor(index, batch)
    if options["steps"] == "1":
        arguments["intermediate_states_buffer"] = tensor(state, batch, tokens, v_heads, 128, 128)
    return arguments


def _gdn_prefill(options: Options) -> Arguments:
    q_heads, v_heads, length, count = 16, 32, 128, 2  # the kernel accepts any values
    gate = tensor("f32", length, v_heads)

    def states(option: str, count: int = count) -> dict[str, object] | None:
        dtype = options[option]
        return None if dtype == "0" else tensor(dtype, count, v_heads, 128, 128)

    checkpoints = options["checkpoints"] != "0"
    return {
        "q": tensor(options["dtype"], length, q_heads, 128),
        "k": tensor(options["dtype"], length, q_heads, 128),
        "v": tensor(options["dtype"], length, v_heads, 128),
        "g": gate if options["alpha"] == "1" else None,
        "beta": gate if options["beta"] == "1" else None,
        "initial_state": states("initial_state"),
        "output_final_state": True,
        "cu_seqlens": tensor(options["cu_seqlens"], count + 1),
        "output_state": states("state"),
        "state_checkpoints": states("checkpoints", 4),
        "checkpoint_cu_starts": tensor(options["cu_seqlens"], count + 1) if checkpoints else None,
        "checkpoint_every_n_tokens": 64 if checkpoints else 0,
        "state_indices": None if options["indices"] == "0" else tensor(options["indices"], count),
        "use_cp": False,
        "backend": "flashinfer",
    }


def _kda_decode(options: Options) -> Arguments:
    batch, tokens, heads, group, size = _numbers(
        options, "batch", "tokens", "heads", "group", "head_size"
    )
    is_on = {name: options[name] == "1" for name in ("gate", *KDA_FLAGS)}
    # With as many tokens as requests, FlashInfer would choose a kernel for just that.
    axes = (1, batch + 1) if is_on["packed"] else (batch, tokens)
    states = tensor("bf16", batch * tokens, heads * group, size, size)
    each = tensor("bf16", *axes, heads, size)
    each_value = tensor("bf16", *axes, heads * group, size)
    return {
        "q": each,
        "k": each,
        "v": each_value,
        "g": each_value,
        "beta": tensor("bf16", *axes, heads * group),
        "A_log": tensor("f32", heads) if is_on["gate"] else None,
        "dt_bias": tensor("f32", heads * size) if is_on["gate"] and is_on["bias"] else None,
        "initial_state": states,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": is_on["norm"],
        "use_gate_in_kernel": is_on["gate"],
        "lower_bound": -5.0 if is_on["bound"] else None,  # any number: the call gives it again
        "cu_seqlens": tensor("i32", batch + 1) if is_on["packed"] else None,
        "ssm_state_indices": tensor("i32", batch) if is_on["packed"] else None,
        "num_spec_tokens": tokens - 1 if tokens > 1 else None,
        "beta_is_logit": is_on["logit"],
        "backend": "cute-dsl",
    }


def _rmsnorm(options: Options) -> Arguments:
    return {
        "dtype_str": DTYPES[options["dtype"]],
        "H": int(options["hidden_size"]),
        "weight_bias": float(options["weight_bias"]),
        "enable_pdl": False,
        "sm_version": "sm",
        "contiguous": options["contiguous"] == "1",
    }


def _qk_rmsnorm(options: Options) -> Arguments:
    return {
        "dtype_str": DTYPES[options["dtype"]],
        "head_dim": int(options["head_size"]),
        "weight_bias": float(options["weight_bias"]),
        "enable_pdl": False,
        "sm_version": "sm",
    }


def _rmsnorm_fp4quant(options: Options) -> Arguments:
    return {
        "hidden_size": int(options["hidden_size"]),
        "block_size": int(options["block_size"]),
        "is_fp16": options["dtype"] == "f16",
        "sm_version": "sm",
        "scale_format": options["scale"],
        "is_sf_swizzled_layout": options["swizzled"] == "1",
        "enable_pdl": False,
    }


def _mla_decode(options: Options) -> Arguments:
    dtype = options["dtype"]
    is_varied = options["lengths"] == "varied"
    return {
        "torch_dtype": f"torch.{DTYPES[dtype]}",
        "torch_out_dtype": f"torch.{DTYPES['bf16' if dtype == 'e4m3' else dtype]}",
        "page_size": int(options["page_size"]),
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "is_persistent": not is_varied,
        "is_var_seq": is_varied,
        "is_var_split_kv": False,
        "is_workspace_size_zero": options["split"] == "0",
    }


class CuteCall(NamedTuple):
    """A call that makes FlashInfer compile a family's kernels: "module:function", its arguments."""

    function: str
    arguments: Callable[[Options], Arguments]


_NORM = "flashinfer.norm.kernels.rmsnorm:_get_compiled_{}_kernel"
_MLA = "flashinfer.cute_dsl.attention.wrappers.batch_mla:_compile_mla_kernel"
CALLS = {
    "gdn_decode": CuteCall(
        "flashinfer.gdn_decode:gated_delta_rule_decode_pretranspose", _gdn_decode
    ),
    "gdn_decode_keys_first": CuteCall(
        "flashinfer.gdn_decode:gated_delta_rule_decode", _gdn_decode_keys_first
    ),
    "gdn_prefill": CuteCall("flashinfer.gdn_prefill:chunk_gated_delta_rule", _gdn_prefill),
    "kda_decode": CuteCall("flashinfer.kda_kernels.recurrent_kda:run_recurrent_kda", _kda_decode),
    "mla_decode": CuteCall(_MLA, _mla_decode),
    "qk_rmsnorm_cute": CuteCall(_NORM.format("qk_rmsnorm"), _qk_rmsnorm),
    "rmsnorm_cute": CuteCall(_NORM.format("rmsnorm"), _rmsnorm),
    "rmsnorm_fp4quant": CuteCall(
        "flashinfer.cute_dsl.rmsnorm_fp4quant:_get_compiled_kernel", _rmsnorm_fp4quant
    ),
}


def question(request: Request) -> dict[str, object]:
    """Return a request for kernels of CuTe DSL as `cute_driver.py` takes it."""
    assert request.family is not None
    family, options = request.family, request.all_options
    call = CALLS[family.name]
    return {
        "text": request.text,
        "exact": request.exact,
        "function": call.function,
        "module": family.stem,
        "arguments": call.arguments(options),
        "name": family.suffix(options),
    }
