"""The fused kernels of the `norm` module in numpy, rounding where they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array, store

_E4M3_LIMIT = np.float32(448)


def _frequencies(channels: int, base: float, factor: float, low: float, high: float) -> Array:
    """How far each pair turns with one patch; slower from pair `low` to pair `high` on."""
    pair = np.arange(channels // 2, dtype=np.float32)
    fast: Array = np.float32(base) ** (-2 * pair / np.float32(max(channels, 1)))
    if np.float32(factor) == 1:
        return fast
    high += 0.001 if abs(low - high) <= 1e-6 else 0.0
    kept = 1 - np.clip((pair - np.float32(low)) / np.float32(high - low), 0, 1)
    mixed: Array = fast / np.float32(factor) * (1 - kept) + fast * kept
    return mixed.astype(np.float32)


def _angles(
    tokens: int, patches: tuple[int, int, int], channels: tuple[int, int, int], *yarn: float
) -> Array:
    """By how much each pair of a token's head turns."""
    _, rows, columns = patches
    at = np.arange(tokens) % int(np.prod(patches))
    places = at // (rows * columns), at // columns % rows, at % columns
    turns = [
        place.astype(np.float32)[:, None] * _frequencies(count, *yarn)
        for place, count in zip(places, channels, strict=True)
    ]
    return np.concatenate(turns, axis=1)


def _turned(x: Array, angles: Array, interleave: bool) -> Array:
    half = x.shape[-1] // 2
    apart = slice(half), slice(half, None)
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleave else apart
    one, two = (x[..., part] for part in pairs)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = np.empty_like(x)
    turned[..., pairs[0]] = one * cos - two * sin
    turned[..., pairs[1]] = two * cos + one * sin
    return turned


def _store(out: Array, x: Array, scale: float) -> None:
    if out.dtype.itemsize == 1:
        x = np.clip(x * np.float32(scale), -_E4M3_LIMIT, _E4M3_LIMIT)
    store(out, x)


def fused_qk_rmsnorm_rope(
    qkv_in: Array, q_weight: Array, k_weight: Array, q_out: Array, k_out: Array, v_out: Array,
    *numbers: Any,
) -> None:  # fmt: skip
    tokens, _, ppf, pph, ppw, frame, height, width, of_q, of_k, _, _, eps, base = numbers[:14]
    interleave, factor, low, high, attention, is_normed, _, scale, v_scale = numbers[14:]
    yarn = base, factor, low, high
    angles = _angles(tokens, (ppf, pph, ppw), (frame, height, width), *yarn)
    q, k, v = np.split(qkv_in.astype(np.float32), [of_q, of_q + of_k], axis=1)
    for x, weight, out in ((q, q_weight, q_out), (k, k_weight, k_out)):
        if is_normed:
            count = np.float32(max(weight.size, 1))
            square = np.sum(np.square(x), axis=(1, 2), keepdims=True, dtype=np.float32) / count
            x = x * (1 / np.sqrt(square + np.float32(eps))) * weight.astype(np.float32)
            # Not on the way to float8, which is coarser.
            if out.dtype.itemsize > 1:
                x = x.astype(out.dtype).astype(np.float32)
        turned = _turned(x, angles, interleave)
        _store(out, turned * np.float32(attention) if factor != 1 else turned, scale)
    _store(v_out, v, v_scale)


_GATED, _SHIFTED = (0, 2), (1, 2)


def fused_dit_layernorm(
    input: Array, residual: Array, gate: Array, gate_bias: Array, gamma: Array, beta: Array,
    scale: Array, scale_bias: Array, shift: Array, shift_bias: Array, residual_out: Array,
    norm_out: Array, sf_out: Array, sf_scale: Array, input_sf_scale: Array, epsilon: float,
    mode: int, output_format: int,
) -> None:  # fmt: skip
    x = input.astype(np.float32)
    if input_sf_scale is not None and input_sf_scale.size:
        x = x * input_sf_scale[0]
    if mode in _GATED:
        x = x * (gate.astype(np.float32) + gate_bias)
    if residual is not None and residual.size:
        x = x + residual.astype(np.float32)
    store(residual_out, x)
    mean, square = (np.mean(each, axis=-1, keepdims=True) for each in (x, np.square(x)))
    variance = np.maximum(square - mean * mean, np.float32(0))
    x = (x - mean) * (1 / np.sqrt(variance + np.float32(epsilon)))
    if mode in _SHIFTED:
        added = shift.astype(np.float32) + shift_bias
        x = x * (1 + (scale.astype(np.float32) + scale_bias)) + added
    else:
        x = x * gamma + beta
    store(norm_out, x)


KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "norm": {
        "fused_qk_rmsnorm_rope": fused_qk_rmsnorm_rope,
        "fused_dit_layernorm": fused_dit_layernorm,
    }
}
