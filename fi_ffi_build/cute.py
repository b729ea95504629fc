"""Kernels in CuTe DSL that `fi-ffi build` makes, and the calls that make FlashInfer compile them.

They are not in FlashInfer's list of modules built ahead of time: FlashInfer compiles such a kernel
when it is called, for the shapes, dtypes and flags of the call. Therefore each family here is such
a call, and its options determine the kernel. `cute_driver.py` makes the call in the build
environment, without a GPU. A module takes the name under which FlashInfer caches the kernel, or a
name built from the options if FlashInfer does not cache it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fi_ffi.loader.uris import DTYPES
from fi_ffi_build.options import Option

Options = Mapping[str, str]
Arguments = dict[str, Any]


def tensor(dtype: str, *shape: int, stride: int = 0) -> dict[str, object]:
    """Return a placeholder for any tensor with this dtype and these compiled sizes. With `stride`,
    that is the distance of the first axis, in elements."""
    found: dict[str, object] = {"tensor": DTYPES[dtype], "shape": list(shape)}
    return found | {"stride": stride} if stride else found


@dataclass(frozen=True)
class CuteCall:
    """A call that makes FlashInfer compile kernels.

    `function` is the function to call, as "module:function". `module` and `name` give the names of
    modules that FlashInfer does not cache.
    """

    function: str
    module: str
    arguments: Callable[[Options], Arguments]
    name: Callable[[Options], list[str]]

    def as_json(self, options: Options) -> dict[str, object]:
        """Return the request for the driver in the build environment."""
        return {
            "function": self.function,
            "module": self.module,
            "arguments": self.arguments(options),
            "name": "_".join(self.name(options)),
        }


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
    found: Arguments = {
        **_gdn_token(options, batch, tokens, q_heads, v_heads),
        "state": None,
        "disable_state_update": options["update"] == "0",
        "backend": "flashinfer",
    }
    if options["pool"] == "0":
        return {**found, "state": states}
    found |= {"initial_state": states, "initial_state_indices": tensor(index, batch)}
    if options["split"] == "1":
        found["output_state_indices"] = tensor(index, batch)
    if options["steps"] == "1":
        found["intermediate_states_buffer"] = tensor(state, batch, tokens, v_heads, 128, 128)
    return found


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


def _gdn_prefill_name(options: Options) -> list[str]:
    def there(option: str, name: str) -> str:
        value = options[option]
        return f"no{name}" if value == "0" else name if value == "1" else f"{name}_{DTYPES[value]}"

    return [
        DTYPES[options["dtype"]],
        there("alpha", "alpha"),
        there("beta", "beta"),
        there("initial_state", "init"),
        DTYPES[options["state"]],
        there("checkpoints", "checkpoints"),
        there("indices", "indices"),
        DTYPES[options["cu_seqlens"]],
    ]


def _kda_decode(options: Options) -> Arguments:
    batch, tokens, heads, group, size = _numbers(
        options, "batch", "tokens", "heads", "group", "head_size"
    )
    is_on = {name: options[name] == "1" for name in ("gate", *_KDA_FLAGS)}
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


# What the names of modules tell where an option is not the default.
_KDA_FLAGS = {
    "bias": "nobias", "bound": "bound", "norm": "nonorm", "logit": "logit", "packed": "packed",
}  # fmt: skip


def _kda_decode_name(options: Options) -> list[str]:
    # The kernel for one token takes any number of heads.
    group = [f"g{options['group']}"] if options["tokens"] != "1" else []
    flags = [
        word for name, word in _KDA_FLAGS.items() if options[name] != _KDA_OPTIONS[name].default
    ]
    return [
        *(f"{name[0]}{options[name]}" for name in ("batch", "tokens", "heads")),
        *group,
        f"d{options['head_size']}",
        "gate" if options["gate"] == "1" else "nogate",
        *flags,
    ]


def _rmsnorm(options: Options) -> Arguments:
    return {
        "dtype_str": DTYPES[options["dtype"]],
        "H": int(options["hidden_size"]),
        "weight_bias": float(options["weight_bias"]),
        "enable_pdl": False,
        "sm_version": "sm",
        "contiguous": options["contiguous"] == "1",
    }


def _rmsnorm_name(options: Options) -> list[str]:
    strided = [] if options["contiguous"] == "1" else ["strided"]
    return [
        DTYPES[options["dtype"]],
        options["hidden_size"],
        f"bias{options['weight_bias']}",
        *strided,
    ]


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


def _rmsnorm_fp4quant_name(options: Options) -> list[str]:
    layout = "swizzled" if options["swizzled"] == "1" else "rows"
    return [
        DTYPES[options["dtype"]],
        options["hidden_size"],
        f"{options['scale']}x{options['block_size']}",
        layout,
    ]


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


def _mla_decode_name(options: Options) -> list[str]:
    split = "split" if options["split"] == "1" else "whole"
    return [DTYPES[options["dtype"]], f"p{options['page_size']}", options["lengths"], split]


def _every(options: Options) -> list[str]:
    """Return every option, as a name for kernels that FlashInfer names itself since 0.7."""
    return [f"{name}_{value}" for name, value in options.items()]


CALLS = {
    "gdn_decode": CuteCall(
        "flashinfer.gdn_decode:gated_delta_rule_decode_pretranspose", "gdn_decode",
        _gdn_decode, _every,
    ),
    "gdn_decode_keys_first": CuteCall(
        "flashinfer.gdn_decode:gated_delta_rule_decode", "gdn_decode",
        _gdn_decode_keys_first, _every,
    ),
    "gdn_prefill": CuteCall(
        "flashinfer.gdn_prefill:chunk_gated_delta_rule", "gdn_prefill_sm90",
        _gdn_prefill, _gdn_prefill_name,
    ),
    "kda_decode": CuteCall(
        "flashinfer.kda_kernels.recurrent_kda:run_recurrent_kda", "recurrent_kda",
        _kda_decode, _kda_decode_name,
    ),
    "mla_decode": CuteCall(
        "flashinfer.cute_dsl.attention.wrappers.batch_mla:_compile_mla_kernel", "mla_decode",
        _mla_decode, _mla_decode_name,
    ),
    "rmsnorm_cute": CuteCall(
        "flashinfer.norm.kernels.rmsnorm:_get_compiled_rmsnorm_kernel", "rmsnorm",
        _rmsnorm, _rmsnorm_name,
    ),
    "rmsnorm_fp4quant": CuteCall(
        "flashinfer.cute_dsl.rmsnorm_fp4quant:_get_compiled_kernel", "rmsnorm_fp4quant",
        _rmsnorm_fp4quant, _rmsnorm_fp4quant_name,
    ),
}  # fmt: skip


def _count(default: int, doc: str) -> Option:
    return Option(None, str(default), doc, r"[1-9]\d{0,5}")


def _size(doc: str) -> Option:
    return Option(None, "0", doc, r"0|[1-9]\d{0,11}")


def _flag(default: str, doc: str) -> Option:
    return Option(("0", "1"), default, doc)


_STATES = ("f32", "bf16", "f16", "e4m3", "e5m2")
_GATE = Option(("bf16", "f16", "f32"), "bf16", "type of this gate")
_TOKEN = {
    "batch": _count(64, "requests of a call, by which FlashInfer chooses a kernel"),
    "q_heads": _count(16, "heads of queries and keys"),
    "v_heads": _count(32, "heads of values"),
    "a": _GATE,
    "b": _GATE,
    "dt_bias": Option(("f32", "bf16"), "f32", "type of dt_bias"),
    "l2norm": _flag("1", "queries and keys normalised"),
}
_FLOATS = Option(("f16", "bf16"), "bf16", "type of inputs and outputs")
_KDA_OPTIONS = {
    "batch": _count(64, "requests of a call, by which FlashInfer chooses a kernel"),
    "tokens": _count(1, "new tokens of each request"),
    "heads": _count(16, "heads of queries and keys"),
    "group": _count(1, "heads of values for each of them"),
    "head_size": Option(("64", "128"), "128", "size of a head"),
    "gate": _flag("1", "the gate is computed by the kernel"),
    "bias": _flag("1", "with dt_bias, if it is"),
    "bound": _flag("0", "the computed gate has a lower bound"),
    "norm": _flag("1", "queries and keys normalised"),
    "logit": _flag("0", "beta is a logit"),
    "packed": _flag("0", "tokens side by side, with cu_seqlens and indices of states"),
}
OPTIONS: dict[str, dict[str, Option]] = {
    "gdn_decode": {
        **_TOKEN,
        "tokens": _count(1, "new tokens of each request"),
        "state": Option(("f32", "bf16"), "f32", "type of the states"),
        "indices": Option(("i32", "i64"), "i32", "type of indices into the pool of states"),
        "pool": _flag("1", "states in a pool"),
        "split": _flag("0", "states written elsewhere than read"),
        "steps": _flag("0", "states kept after each token"),
        "update": _flag("1", "final states written"),
        "slots": _size("states of the pool, if they lie apart; 0: any, one after another"),
        "slot_stride": _size("elements from one such state to the next"),
    },
    "gdn_decode_keys_first": _TOKEN,
    "gdn_prefill": {
        "dtype": _FLOATS,
        "state": Option(_STATES, "f32", "type of the final states"),
        "cu_seqlens": Option(("i32", "i64"), "i64", "type of cu_seqlens"),
        "alpha": _flag("1", "with a forget gate"),
        "beta": _flag("1", "with an update gate"),
        "initial_state": Option(("0", *_STATES), "f32", "type of initial states, 0: none"),
        "checkpoints": Option(("0", *_STATES), "0", "type of states kept on the way"),
        "indices": Option(("0", "i32", "i64"), "0", "type of indices into a pool of states"),
    },
    "kda_decode": _KDA_OPTIONS,
    "mla_decode": {
        "dtype": Option(("f16", "bf16", "e4m3"), "bf16", "type of queries and of the cache"),
        "page_size": Option(
            ("1", "2", "4", "8", "16", "32", "64", "128"), "64", "tokens of a page"
        ),
        "lengths": Option(("varied", "equal"), "varied", "of the requests of a call"),
        "split": _flag("1", "requests are split, with a workspace"),
    },
    "rmsnorm_cute": {
        "dtype": _FLOATS,
        "hidden_size": _count(4096, "hidden size"),
        "weight_bias": Option(("0", "1"), "0", "what is added to the weight"),
        "contiguous": _flag("1", "rows one after another"),
    },
    "rmsnorm_fp4quant": {
        "dtype": _FLOATS,
        "hidden_size": _count(4096, "hidden size"),
        "block_size": Option(("16", "32"), "16", "numbers that share a scale"),
        "scale": Option(("e4m3", "ue8m0"), "e4m3", "type of the scales"),
        "swizzled": _flag("0", "scales as tensor cores read them"),
    },
}
DOCS = {
    "gdn_decode": "gated delta rule, new tokens of many requests",
    "gdn_decode_keys_first": "the same over states as [key, value], a token of each request",
    "gdn_prefill": "gated delta rule, whole sequences (needs 9.0a)",
    "kda_decode": "Kimi delta attention, new tokens of many requests",
    "mla_decode": "latent attention, new tokens of many requests (10.0 and 10.3)",
    "rmsnorm_cute": "RMS norm",
    "rmsnorm_fp4quant": "RMS norm and quantisation to fp4",
}

_MADE = re.compile(r"(\w+?)_sm(\d+)(\d[af]?)_cute_dsl_(\w+)")


def request_for(module: str) -> tuple[str, str] | None:
    """Return the `fi-ffi build` request and the architecture for a module of this name.

    The request is "" if the name does not determine the options. Returns None if no CuTe DSL module
    can have this name.
    """
    made = _MADE.fullmatch(module)
    if made is None:
        return None
    owner, major, minor, words = made.groups()
    numbers = re.findall(r"\d+", words)
    for family, call in CALLS.items():
        if call.module != owner or call.name is _every:
            continue
        known = OPTIONS[family]
        choices = [
            [v for v in option.values if v in "01" or v in words or DTYPES.get(v, v) in words]
            if option.values
            else [n for n in dict.fromkeys((option.default, *numbers)) if option.accepts(n)]
            for option in known.values()
        ]
        for values in itertools.product(*choices):
            given = dict(zip(known, values, strict=True))
            if words.endswith("_" + "_".join(call.name(given))):
                text = ",".join(
                    f"{name}={value}" for name, value in given.items()
                    if value != known[name].default
                )  # fmt: skip
                return f"{family}:{text}" if text else family, f"{major}.{minor}"
    return "", f"{major}.{minor}"
