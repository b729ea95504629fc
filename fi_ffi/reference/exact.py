"""Ops in float64, written from their definition and not from the kernels.

Those that only move what they are given (`MOVES`) take it as it is, and give the
tensors they write as they must be afterwards, bit for bit.

`largest` in the inputs has the largest value of each tensor's dtype, where it has one.

What results are compared with: the reference kernels' in the tests, a GPU's in
the tests and in `fi-ffi demo`.  Each gives, for every tensor it writes, the value
and the magnitude its rounding errors scale with.
"""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np

from fi_ffi.families import FAMILIES
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact_gdn import gdn_prefill
from fi_ffi.reference.formula import Exact, Formula, Inputs, Move

_E4M3_LIMIT = 448.0


def _rms_rows(x: Array, weight: Array, eps: float) -> Array:
    root = np.hypot(np.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5, eps**0.5)
    rows: Array = x / root * weight
    return rows


def _of_own_size(**values: Array) -> Exact:
    return {name: (value, np.abs(value)) for name, value in values.items()}


def rmsnorm(a: Inputs) -> Exact:
    return _of_own_size(out=_rms_rows(a["input"], a["weight"], a["eps"]))


def gemma_rmsnorm(a: Inputs) -> Exact:
    return _of_own_size(out=_rms_rows(a["input"], 1 + a["weight"], a["eps"]))


def fused_add_rmsnorm(a: Inputs) -> Exact:
    total = a["input"] + a["residual"]
    return _of_own_size(residual=total, input=_rms_rows(total, a["weight"], a["eps"]))


def gemma_fused_add_rmsnorm(a: Inputs) -> Exact:
    return fused_add_rmsnorm(a | {"weight": 1 + a["weight"]})


def rmsnorm_quant(a: Inputs, limit: float = _E4M3_LIMIT) -> Exact:
    rows = _rms_rows(a["input"], a["weight"], a["eps"]) / a["scale"]
    return _of_own_size(out=np.clip(rows, -limit, limit))


def rmsnorm_quant_full_range(a: Inputs) -> Exact:
    return rmsnorm_quant(a, a["largest"]["out"])


def fused_add_rmsnorm_quant(a: Inputs, limit: float = _E4M3_LIMIT) -> Exact:
    total = a["input"] + a["residual"]
    rows = _rms_rows(total, a["weight"], a["eps"]) / a["scale"]
    return _of_own_size(residual=total, out=np.clip(rows, -limit, limit))


def fused_add_rmsnorm_quant_full_range(a: Inputs) -> Exact:
    return fused_add_rmsnorm_quant(a, a["largest"]["out"])


def layernorm(a: Inputs) -> Exact:
    x = a["input"]
    mean = x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + a["eps"])
    value = (x - mean) / deviation * a["gamma"] + a["beta"]
    terms = (np.abs(x) + np.abs(mean)) / deviation * np.abs(a["gamma"]) + np.abs(a["beta"])
    return {"out": (value, terms)}


EXACT: dict[str, Formula] = {
    "rmsnorm": rmsnorm,
    "qk_rmsnorm": rmsnorm,
    "gemma_rmsnorm": gemma_rmsnorm,
    "fused_add_rmsnorm": fused_add_rmsnorm,
    "gemma_fused_add_rmsnorm": gemma_fused_add_rmsnorm,
    "rmsnorm_quant": rmsnorm_quant,
    "rmsnorm_quant_full_range": rmsnorm_quant_full_range,
    "fused_add_rmsnorm_quant": fused_add_rmsnorm_quant,
    "fused_add_rmsnorm_quant_full_range": fused_add_rmsnorm_quant_full_range,
    "layernorm": layernorm,
    "gdn_prefill": gdn_prefill,
}


def _append(a: Inputs, new: Array, cache: Array, layout: str = "NHD") -> Array:
    """The cache with the new tokens in it, one after another."""
    after: Array = cache.copy()
    tokens = after if layout == "NHD" else after.transpose(0, 2, 1, 3)
    size = tokens.shape[1]
    for token, request, position in zip(new, a["batch_indices"], a["positions"], strict=True):
        first, end = a["kv_indptr"][request : request + 2]
        page = a["kv_indices"][first:end][position // size]
        tokens[page, position % size] = token
    return after


def append_paged_kv_cache(a: Inputs) -> dict[str, Array]:
    return {
        cache: _append(a, a[new], a[cache], a["kv_layout"])
        for new, cache in (("append_key", "paged_k_cache"), ("append_value", "paged_v_cache"))
    }


def append_paged_mla_kv_cache(a: Inputs) -> dict[str, Array]:
    return {
        cache: _append(a, a[new], a[cache])
        for new, cache in (("append_ckv", "ckv_cache"), ("append_kpe", "kpe_cache"))
    }


MOVES: dict[str, Move] = {
    "append_paged_kv_cache": append_paged_kv_cache,
    "append_paged_mla_kv_cache": append_paged_mla_kv_cache,
}
for _family in FAMILIES:
    for _name in (f"fi_ffi.reference.{_family}", f"fi_ffi.reference.exact_{_family}"):
        if importlib.util.find_spec(_name):
            _module = importlib.import_module(_name)
            EXACT.update(getattr(_module, "EXACT", {}))
            MOVES.update(getattr(_module, "MOVES", {}))
