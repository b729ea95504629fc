"""Fused kernels of diffusion transformers in float64, from their definition."""

from __future__ import annotations

import math

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs


def _speed(a: Inputs, pair: int, channels: int) -> float:
    """Return the angle by which a pair turns with each patch."""
    speed = float(a["base"]) ** (-2 * pair / channels)
    high = a["high"] if abs(a["high"] - a["low"]) > 1e-6 else a["low"] + 1e-3
    slow = min(max((pair - a["low"]) / (high - a["low"]), 0.0), 1.0)
    return float(speed * (1 - slow) + speed / a["factor"] * slow)


def _turns(a: Inputs, tokens: int, pairs: int) -> Array:
    """Return exp(i * angle) of each token and pair."""
    axes = ("frame", "height", "width")
    channels = {axis: a[f"num_{axis}_channels"] for axis in axes}
    speeds = {axis: [_speed(a, i, n) for i in range(n // 2)] for axis, n in channels.items()}
    angles = np.zeros((tokens, pairs))
    for token in range(tokens):
        patch, column = divmod(token % a["seq_len"], a["ppw"])
        places = dict(zip(axes, (*divmod(patch, a["pph"]), column), strict=True))
        angles[token] = [places[axis] * speed for axis in axes for speed in speeds[axis]]
    turns: Array = np.exp(1j * angles)
    return turns


def _rotated(a: Inputs, x: Array, turns: Array) -> tuple[Array, Array]:
    """Turn heads pair by pair; return also the length of each element's pair."""
    size = x.shape[-1]
    order = np.arange(size).reshape(-1, 2) if a["interleave"] else np.arange(size).reshape(2, -1).T
    pairs = (x[..., order[:, 0]] + 1j * x[..., order[:, 1]]) * turns[:, None]
    value, length = np.empty_like(x), np.empty_like(x)
    value[..., order[:, 0]], value[..., order[:, 1]] = pairs.real, pairs.imag
    length[..., order[:, 0]] = length[..., order[:, 1]] = np.abs(pairs)
    return value, length


def fused_qk_rmsnorm_rope(a: Inputs) -> Exact:
    heads = [len(a["q_weight"]), len(a["k_weight"])]
    q, k, v = np.split(a["qkv_in"], np.cumsum(heads), axis=1)
    turns = _turns(a, len(q), q.shape[-1] // 2)
    yarn = a["attention_factor"] if a["factor"] != 1 else 1.0
    limit, scale, of_v = np.inf, 1.0, 1.0
    if a["output_fp8"]:
        limit, scale, of_v = 448.0, a["output_quant_scale"], a["v_quant_scale"]
    exact: dict[str, tuple[Array, Array]] = {}
    for name, x in (("q", q), ("k", k)):
        if a["is_qk_norm"]:
            square = (x**2).sum(axis=(1, 2), keepdims=True) / max(math.prod(x.shape[1:]), 1)
            x = x / np.sqrt(square + a["eps"]) * a[f"{name}_weight"]
        value, length = _rotated(a, x, turns)
        value, length = value * yarn * scale, length * yarn * scale
        exact[f"{name}_out"] = np.clip(value, -limit, limit), length
    # A copy, or a single product, then rounded.
    copy = np.clip(v * of_v, -limit, limit)
    exact["v_out"] = copy, np.abs(copy) * 2.0**-16
    return exact


def _or(a: Inputs, name: str, number: float) -> Array:
    """Return an optional tensor, or a number; for a missing one, entries get a tensor without
    elements."""
    tensor: Array = a.get(name, np.empty(0))
    return tensor if tensor.size else np.array(number)


def _layernorm(a: Inputs) -> Exact:
    """Return each value with the sum of its terms' magnitudes."""
    gate, of_gate = 1.0, 1.0
    if "gate" in a:
        bias = _or(a, "gate_bias", 0.0)
        gate, of_gate = a["gate"] + bias, np.abs(a["gate"]) + np.abs(bias)
    x, residual = a["input"] * _or(a, "input_sf_scale", 1.0), _or(a, "residual", 0.0)
    total, of_total = x * gate + residual, np.abs(x) * of_gate + np.abs(residual)
    mean = total.mean(axis=-1, keepdims=True)
    variance = ((total - mean) ** 2).mean(axis=-1, keepdims=True) + a["epsilon"]
    # The kernel computes the variance as a difference of two means, which loses digits.
    lost = 1 + ((total**2).mean(axis=-1, keepdims=True) + mean**2) / variance
    if "gamma" in a:
        factor, of_factor, added = a["gamma"], np.abs(a["gamma"]), a["beta"]
        of_added = np.abs(added)
    else:
        biases = {name: _or(a, f"{name}_bias", 0.0) for name in ("scale", "shift")}
        factor = 1 + a["scale"] + biases["scale"]
        of_factor = 1 + np.abs(a["scale"]) + np.abs(biases["scale"])
        added = a["shift"] + biases["shift"]
        of_added = np.abs(a["shift"]) + np.abs(biases["shift"])
    value = (total - mean) / np.sqrt(variance) * factor + added
    terms = (of_total + np.abs(mean)) / np.sqrt(variance) * lost * of_factor + of_added
    return {"residual_out": (total, of_total), "norm_out": (value, terms)}


_LAYERNORMS = (
    "fused_dit_gate_residual_layernorm_gamma_beta",
    "fused_dit_residual_layernorm_scale_shift",
    "fused_dit_gate_residual_layernorm_scale_shift",
)
EXACT: dict[str, Formula] = {
    "fused_qk_rmsnorm_rope": fused_qk_rmsnorm_rope,
    **dict.fromkeys(_LAYERNORMS, _layernorm),
}
