"""The `norm` module in float64, from its ops' definitions.

The fused ops store the sum rounded to the residual's dtype, and normalise the unrounded sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs

_E4M3_LIMIT = 448.0  # older kernels clamp float8_e5m2 to it as well


def _rms_rows(x: Array, weight: Array, eps: float) -> Array:
    root = np.hypot(np.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5, eps**0.5)
    rows: Array = x / root * weight
    return rows


def _of_own_size(**values: Array) -> Exact:
    return {name: (value, np.abs(value)) for name, value in values.items()}


def _clamped(x: Array, limit: float) -> Array:
    """Clamp with fmin and fmax, as the kernel does: a NaN becomes the limit."""
    clamped: Array = np.fmax(-limit, np.fmin(x, limit))
    return clamped


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
    return _of_own_size(out=_clamped(rows, limit))


def rmsnorm_quant_full_range(a: Inputs) -> Exact:
    return rmsnorm_quant(a, a["largest"]["out"])


def fused_add_rmsnorm_quant(a: Inputs, limit: float = _E4M3_LIMIT) -> Exact:
    total = a["input"] + a["residual"]
    rows = _rms_rows(total, a["weight"], a["eps"]) / a["scale"]
    return _of_own_size(residual=total, out=_clamped(rows, limit))


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
}
# Kernels instead of formulas, by module and entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {"norm": {}}
