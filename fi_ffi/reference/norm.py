"""The `norm` module in numpy: float32 arithmetic, as `include/flashinfer/norm.cuh` has it.

Where a kernel rounds is part of what it computes: the fused kernels store the
sum rounded to the residual's dtype and normalise it unrounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, store

_E4M3_LIMIT = 448.0  # up to FlashInfer 0.6.15 the kernels clamp float8_e5m2 to it too


def _normalised(x: Array, weight: Array, eps: float, weight_bias: float = 0.0) -> Array:
    """Rows of float32 `x` over their root mean square, times the biased weight."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    scale = 1 / np.sqrt(mean_square + np.float32(eps))
    result: Array = x * scale * (np.float32(weight_bias) + _float32(weight))
    return result


def _float32(x: Array) -> Array:
    return x.astype(np.float32)


def _store_quantised(out: Array, x: Array, scale: Array | float, limit: float) -> None:
    # A tensor of one element, or (up to FlashInfer 0.6.6) a number.
    scaled = x * (np.float32(1) / np.float32(np.ravel(scale)[0]))
    # fmin and fmax, like the kernel's: a NaN becomes the limit.
    store(out, np.fmax(np.float32(-limit), np.fmin(scaled, np.float32(limit))))


def _largest(out: Array) -> float:
    return float(ml_dtypes.finfo(out.dtype).max)


def rmsnorm(out: Array, input: Array, weight: Array, eps: float, enable_pdl: bool) -> None:
    store(out, _normalised(_float32(input), weight, eps))


def gemma_rmsnorm(out: Array, input: Array, weight: Array, eps: float, enable_pdl: bool) -> None:
    store(out, _normalised(_float32(input), weight, eps, 1.0))


def _fused_add(input: Array, residual: Array, weight: Array, eps: float, bias: float) -> None:
    x = _float32(input) + _float32(residual)
    store(residual, x)
    store(input, _normalised(x, weight, eps, bias))


def fused_add_rmsnorm(
    input: Array, residual: Array, weight: Array, eps: float, enable_pdl: bool
) -> None:
    _fused_add(input, residual, weight, eps, 0.0)


def gemma_fused_add_rmsnorm(
    input: Array, residual: Array, weight: Array, eps: float, enable_pdl: bool
) -> None:
    _fused_add(input, residual, weight, eps, 1.0)


def rmsnorm_quant(
    out: Array, input: Array, weight: Array, scale: Array | float, eps: float, enable_pdl: bool
) -> None:
    _store_quantised(out, _normalised(_float32(input), weight, eps), scale, _E4M3_LIMIT)


def rmsnorm_quant_full_range(
    out: Array, input: Array, weight: Array, scale: Array, eps: float, enable_pdl: bool
) -> None:
    _store_quantised(out, _normalised(_float32(input), weight, eps), scale, _largest(out))


def fused_add_rmsnorm_quant(
    out: Array,
    input: Array,
    residual: Array,
    weight: Array,
    scale: Array | float,
    eps: float,
    enable_pdl: bool,
    *,
    limit: float = _E4M3_LIMIT,
) -> None:
    x = _float32(input) + _float32(residual)
    store(residual, x)
    _store_quantised(out, _normalised(x, weight, eps), scale, limit)


def fused_add_rmsnorm_quant_full_range(out: Array, *args: Any) -> None:
    fused_add_rmsnorm_quant(out, *args, limit=_largest(out))


def layernorm(out: Array, input: Array, gamma: Array, beta: Array, eps: float) -> None:
    x = _float32(input)
    centred = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True, dtype=np.float32)
    store(out, centred / np.sqrt(variance + np.float32(eps)) * gamma + beta)


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "norm": {
        kernel.__name__: kernel
        for kernel in (
            rmsnorm,
            gemma_rmsnorm,
            fused_add_rmsnorm,
            gemma_fused_add_rmsnorm,
            rmsnorm_quant,
            rmsnorm_quant_full_range,
            fused_add_rmsnorm_quant,
            fused_add_rmsnorm_quant_full_range,
            layernorm,
        )
    },
}
