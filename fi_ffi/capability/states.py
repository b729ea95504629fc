"""Judges the functions that update states: their modules follow from the call's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.capability.judgement import Query, judge
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.support import MISSING, REFUSED, Support
from fi_ffi.ops.states import gdn, kda, mamba

# Qwen3-Next's heads.
_HEADS: dict[str, Any] = {"h": 16, "hv": 32, "b": 1}
_MAMBA: dict[str, Any] = {
    "state_dtype": "float32",
    "input_dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "matrixA_dtype": "float32",
    "dim": 64,
    "dstate": 128,
}


def judge_gdn_decode(op: str, query: Query, options: Mapping[str, Any]) -> Support:
    """Judge whether there is a module compiled for these: `GdnKernel`'s fields and `b` requests."""
    try:
        fields = {**_HEADS, **options}
        b, layout = fields.pop("b"), fields.get("state_layout", "VK")
        states = gdn.least_states(b, fields["hv"], gdn.MULTIPROCESSORS, layout)
        kernel = gdn.GdnKernel(states=states, **fields)
    except TypeError:
        known = {"b", *gdn.GdnKernel.__dataclass_fields__} - {"states"}
        unknown = next(name for name in options if name not in known)
        raise TypeError(f"{op}.supports() got an unexpected keyword argument {unknown!r}") from None
    capability = query.capability or gdn.CAPABILITY
    module, symbol = kernel.names(capability, gdn.MULTIPROCESSORS)
    answer = judge(op, [gdn.row_of(kernel, symbol)], query, lambda _: module)
    if answer.status == MISSING:
        # The name belongs to no family, so the rest of the reason does not apply.
        reason = answer.reason.partition(". ")[0]
        command = f"fi-ffi build --release {query.release} --arch {query.architecture or '9.0a'}"
        family = _family_of(kernel, b)
        answer = replace(answer, reason=reason, build=f"{command} {family}" if family else None)
    return answer


_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "i32", "int64": "i64"}


def _family_of(kernel: gdn.GdnKernel, b: int) -> str:
    """Return the argument of `fi-ffi build` that makes the module, with the options that differ
    from its defaults; "" if it cannot be built so."""
    if kernel.scale != gdn.GdnKernel.scale:
        return ""
    family = "gdn_decode" if kernel.state_layout == "VK" else "gdn_decode_keys_first"
    dtypes = (*kernel.gate_dtypes, kernel.dt_bias_dtype)
    gate_a, gate_b, bias = (_SHORT.get(name, name) for name in dtypes)
    options = {
        "batch": (b, 64),
        "q_heads": (kernel.h, 16),
        "v_heads": (kernel.hv, 32),
        "a": (gate_a, "bf16"),
        "b": (gate_b, "bf16"),
        "dt_bias": (bias, "f32"),
        "l2norm": (int(kernel.use_qk_l2norm), 1),
    }
    if kernel.state_layout == "VK":
        options |= {
            "tokens": (kernel.t, 1),
            "state": (_SHORT[kernel.state_dtype], "f32"),
            "indices": (_SHORT[kernel.index_dtype], "i32"),
            "slots": (kernel.slots, 0),
            "slot_stride": (kernel.slot_stride, 0),
            "pool": (int(kernel.is_indexed), 1),
            "split": (int(not kernel.is_same_pool), 0),
            "steps": (int(kernel.keeps_each), 0),
            "update": (int(not kernel.disable_state_update), 1),
        }
    unusual = {name: value for name, (value, usual) in options.items() if value != usual}
    text = ",".join(f"{name}={value}" for name, value in unusual.items())
    return f"{family}:{text}" if text else family


def judge_kda(op: str, query: Query, options: Mapping[str, Any]) -> Support:
    """Judge whether there is a module compiled for these: fields of `KdaKernel`."""
    unknown = next(
        (name for name in options if name not in kda.KdaKernel.__dataclass_fields__), None
    )
    if unknown is not None:
        raise TypeError(f"{op}.supports() got an unexpected keyword argument {unknown!r}")
    kernel = kda.KdaKernel(**options)
    if kernel.head_size not in kda.SIZES:
        raise Refusal(op)("head_size", kernel.head_size, "64 or 128")
    module, symbol = kernel.names(query.capability or kda.CAPABILITY)
    return judge(op, [kda.row_of(kernel, symbol)], query, lambda _: module)


def judge_mamba(op: str, query: Query, options: Mapping[str, Any]) -> Support:
    """Judge whether there is a module compiled for these."""
    unknown = next((name for name in options if name not in mamba.DEFAULTS | _MAMBA), None)
    if unknown is not None:
        raise TypeError(f"{op}.supports() got an unexpected keyword argument {unknown!r}")
    major = query.capability[0] if query.capability else 9
    compiled = {**mamba.DEFAULTS, **_MAMBA, **options}
    states = ""
    if compiled["state_scale_dtype"]:
        states = mamba.INT16
    elif compiled["philox_rounds"]:
        states = mamba.RANDOM

    def module(release: str) -> str:
        return mamba.module_for(major, release, **compiled)

    try:
        return judge(op, [mamba.row_of("one", 1, 1, states)], query, module)
    except ArgumentError as error:
        return Support(op, REFUSED, str(error), release=query.release)


# Judges a function or a plan, by its name, with these options.
OfOptions = Callable[[str, Query, Mapping[str, Any]], Support]
STATES: dict[str, OfOptions] = {
    mamba.FAMILY: judge_mamba,
    gdn.FAMILY: judge_gdn_decode,
    kda.FAMILY: judge_kda,
}
