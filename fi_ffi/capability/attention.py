"""Judges attention: the modules of its plans and calls, by their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.capability.judgement import Query, judge
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.backends import Kernel, Target, choose_backend, module_name
from fi_ffi.ops.attention.options import (
    DecodeOptions,
    MlaOptions,
    Options,
    PrefillOptions,
    by_own_names,
)
from fi_ffi.ops.attention.rows import FP8
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import MISSING, REFUSED, Support
from fi_ffi.ops.plans.batch_attention import AttentionOptions
from fi_ffi.ops.plans.rows import FORMS, SINGLE_DECODE, SINGLE_PREFILL
from fi_ffi.ops.plans.single import kernel_of

# Required options of plans on which no module depends.
_PLAN = {"num_qo_heads": 8, "num_kv_heads": 8, "page_size": 16}
_REQUIRED: dict[str, dict[str, Any]] = {
    "BatchPrefillPlan": {**_PLAN, "head_dim_qk": 128},
    "BatchAttentionPlan": {**_PLAN, "head_dim_qk": 128},
    "BatchDecodePlan": {**_PLAN, "head_dim": 128},
    "BatchMlaPlan": {"num_heads": 16, "page_size": 16},
}
_OPTIONS: dict[str, type[Options]] = {
    options.op: options for options in (PrefillOptions, AttentionOptions, DecodeOptions, MlaOptions)
}
_SINGLE: dict[str, Any] = {
    "q_data_type": "float16", "kv_data_type": None, "o_data_type": None, "head_dim": 128,
    "head_dim_vo": None, "pos_encoding_mode": "NONE", "window_left": -1, "logits_soft_cap": 0.0,
}  # fmt: skip
_SINGLE_PREFILL = {"use_fp16_qk_reduction": False, "use_custom_mask": False, "backend": "auto"}


def judge_attention(op: str, query: Query, options: Mapping[str, Any]) -> Support:
    """Judge whether a plan can be made, or a function called, with these options."""
    if op not in _CHOICES:
        return _of_family(op, query, options)
    try:
        kernel, backend, row = _CHOICES[op](op, query, options)

        def module(release: str) -> str:
            return kernel.module(backend, release)

        found = judge(op, FORMS[row], query, module)
    except ArgumentError as error:  # a wrong option, or a module that no release has
        return Support(op, REFUSED, str(error), release=query.release)
    chosen = options.get("backend", "auto") == "auto" and backend == "fa3"
    if found.status != MISSING or not chosen:
        return found
    other = judge_attention(op, query, {**options, "backend": "fa2"})
    more = f"; with backend='fa2' it can be called, by {other.module}" if other else ""
    return replace(found, reason=found.reason + more)


def _of_family(op: str, query: Query, options: Mapping[str, Any]) -> Support:
    """Judge a function without a choice of kernels: by the module for its dtypes and head size if
    its name has these, else by any module of its rows' family."""
    family = _FAMILIES.get(op) or op.lower().removesuffix("plan")
    rows = [row for row in FORMS if row.name.partition(".")[0] == family]
    if not rows:
        raise TypeError(f"{op} has no rows to tell what it needs")
    if not op.endswith("PodPlan"):
        return judge(op, FORMS[rows[0]], query)
    dtype = options.get("q_data_type", "float16")
    params = {
        "dtype_q": dtype,
        "dtype_kv": options.get("kv_data_type") or dtype,
        "dtype_o": options.get("o_data_type") or dtype,
        "head_dim": options.get("head_dim_qk", options.get("head_dim", 128)),
    }
    return judge(op, FORMS[rows[0]], query, lambda release: module_name(family, release, **params))


_FAMILIES = {"BatchPodPlan": "batch_pod"}
_Choice = tuple[Kernel, str, Row]


def _target(op: str, query: Query) -> Target:
    return Target(op, query.capability, query.release)


def _plan(op: str, query: Query, given: Mapping[str, Any], planned_as: str = "") -> _Choice:
    name = planned_as or op
    own = by_own_names(op, _OPTIONS[name].table, given)
    options = _OPTIONS[name](**_REQUIRED[name] | own)
    backend, _, rows = options.choose(_target(op, query))
    # A prefill has ragged and paged runs; other plans have one run.
    is_ragged = options.page_size is None
    return options.kernel, backend, rows[1 if is_ragged else -1]


def _cascade(op: str, query: Query, given: Mapping[str, Any]) -> _Choice:
    del op
    return _plan("BatchPrefillPlan", query, given)


def _sparse(op: str, query: Query, given: Mapping[str, Any]) -> _Choice:
    """Choose as for a prefill over pages."""
    return _plan(op, query, given, "BatchPrefillPlan")


def _single_kernel(
    op: str, known: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Kernel, dict[str, Any]]:
    given = by_own_names(op, known, given)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{op}.supports() got an unexpected keyword argument {unknown[0]!r}")
    asked = {**known, **given}
    q = asked["q_data_type"]
    dtypes = {
        "q_data_type": q,
        "kv_data_type": asked["kv_data_type"] or q,
        "o_data_type": asked["o_data_type"] or ("float16" if q in FP8 else q),
    }
    dims = asked["head_dim"], asked["head_dim_vo"] or asked["head_dim"]
    names = "pos_encoding_mode", "window_left", "logits_soft_cap", "use_fp16_qk_reduction"
    options = [asked[name] for name in names if name in asked]
    return kernel_of(op, dtypes, dims, *options), asked


def _single_prefill(op: str, query: Query, given: Mapping[str, Any]) -> _Choice:
    kernel, asked = _single_kernel(op, _SINGLE | _SINGLE_PREFILL, given)
    target = _target(op, query)
    backend, _ = choose_backend(target, asked["backend"], kernel, asked["use_custom_mask"])
    return kernel, backend, SINGLE_PREFILL[kernel.kind(backend)]


def _single_decode(op: str, query: Query, given: Mapping[str, Any]) -> _Choice:
    del query
    return _single_kernel(op, _SINGLE, given)[0], "", SINGLE_DECODE


_CHOICES: dict[str, Callable[[str, Query, Mapping[str, Any]], _Choice]] = {
    "BatchPrefillPlan": _plan,
    "BlockSparseAttentionPlan": _sparse,
    "VariableBlockSparseAttentionPlan": _sparse,
    "MultiLevelCascadePlan": _cascade,
    "SharedPrefixPlan": _cascade,
    "BatchAttentionPlan": _plan,
    "BatchDecodePlan": _plan,
    "BatchMlaPlan": _plan,
    "single_prefill": _single_prefill,
    "single_decode": _single_decode,
}
# Options with a line in the tables, by the line's name.
_FA = {"fa2": {"backend": "fa2"}, "fa3": {"backend": "fa3"}}
_FP8_QUERIES = {"fa3, fp8 queries": {"backend": "fa3", "q_data_type": "float8_e4m3fn"}}
_SINKS = {
    f"{backend}, attention sinks": {
        "backend": backend, "use_attention_sink": True, "head_dim_qk": 64,
        "q_data_type": "bfloat16",
    }
    for backend in _FA
}  # fmt: skip
# Options for each line; others are judged by any module of the family.
SAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "BatchPrefillPlan": _FA | {"fa2, fp8 keys": {"backend": "fa2", "kv_data_type": "float8_e4m3fn"}}
    | _FP8_QUERIES | _SINKS,
    "BatchAttentionPlan": {"": {}, "fp8 keys": {"kv_data_type": "float8_e4m3fn"},
                           "NVFP4 keys": {"kv_data_type": "uint8"}},
    "BatchDecodePlan": {"": {}, "fp8 keys": {"kv_data_type": "float8_e4m3fn"}},
    "BatchMlaPlan": _FA | {"fp8 cache": {"kv_data_type": "float8_e4m3fn"}},
    "single_prefill": _FA,
    "single_decode": {"": {}},
}  # fmt: skip
