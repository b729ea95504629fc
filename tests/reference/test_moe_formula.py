"""The formula of mixtures of experts against a loop over tokens and their experts."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.reference.moe import Layer, moe

ACTIVATIONS = (
    "Gelu", "Relu", "Silu", "Swiglu", "Geglu", "SwigluBias", "Relu2", "SwigluStep", "GegluTanh",
    "Identity",
)  # fmt: skip
PLAIN = ("Gelu", "Relu", "Silu", "Relu2", "Identity")
TOKENS, EXPERTS, TOP_K, HIDDEN, INTER, FIRST = 5, 3, 2, 128, 256, 1


def e4m3(x: float) -> float:
    return float(np.asarray(max(-448.0, min(448.0, x))).astype(ml_dtypes.float8_e4m3fn))


def rounded(x: float) -> float:
    return float(np.float16(x))


def groups(row) -> list[float]:
    """Quantised with a scale for each 128, and back."""
    found = []
    for start in range(0, len(row), 128):
        part = row[start : start + 128]
        scale = 448.0 / max(map(abs, part)) if any(part) else 1.0
        found += [e4m3(x * scale) / scale for x in part]
    return found


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clamp(x: float, limit: float) -> float:
    return max(-limit, min(limit, x))


def active(name: str, gate: float, linear: float, limits: dict[str, float]) -> float:
    limit = limits.get("limit", 7.0 if name == "SwigluStep" else math.inf)
    if name == "SwigluBias":
        gate = min(gate, limit)
        sigmoid = 1 / (1 + math.exp(-limits.get("alpha", 1.0) * gate))
        return gate * sigmoid * (clamp(linear, limit) + limits.get("beta", 0.0))
    return {
        "Gelu": lambda: gelu(gate),
        "Relu": lambda: max(gate, 0.0),
        "Silu": lambda: silu(gate),
        "Relu2": lambda: max(gate, 0.0) ** 2,
        "Identity": lambda: gate,
        "Swiglu": lambda: silu(gate) * linear,
        "Geglu": lambda: gelu(gate) * linear,
        "GegluTanh": lambda: gelu_tanh(gate) * linear,
        "SwigluStep": lambda: min(silu(gate), limit) * clamp(linear, limit),
    }[name]()


def first_input(layer: Layer, row) -> list[float]:
    if layer.mode == "fp8_block_scale":
        return groups(row)
    if layer.mode == "int4":
        return [e4m3(rounded(x * s)) for x, s in zip(row, layer.scales["pre1"], strict=True)]
    return list(row)


def second_input(layer: Layer, expert: int, row: list[float]) -> list[float]:
    if layer.mode == "fp8":
        return [e4m3(x * layer.scales["quant"][expert]) for x in row]
    if layer.mode == "fp8_block_scale":
        return groups([rounded(x) for x in row])
    if layer.mode == "int4":
        scales = layer.scales["pre2"]
        return [e4m3(rounded(rounded(x) * s)) for x, s in zip(row, scales, strict=True)]
    return row


def one_expert(layer: Layer, expert: int, row) -> np.ndarray:
    ones = np.ones(EXPERTS)
    of1, of2 = (layer.scales.get(name, ones)[expert] for name in ("fc1", "fc2"))
    x = np.array(first_input(layer, row))
    product = [float(np.dot(weights, x)) * of1 for weights in layer.w1[expert]]
    if layer.mode in ("fp8", "fp8_block_scale", "int4"):
        product = [rounded(each) for each in product]
    product = [each + bias for each, bias in zip(product, layer.bias1[expert], strict=True)]
    limits = {name: float(each[expert]) for name, each in (layer.limits or {}).items()}
    # The gate is the second half, and what it multiplies the first.
    gates = product[-INTER:]
    between = [
        active(layer.activation, gate, linear, limits)
        for gate, linear in zip(gates, product[:INTER], strict=True)
    ]
    y = np.array(second_input(layer, expert, between))
    bias = layer.bias2[expert] if layer.adds_bias2 else np.zeros(HIDDEN)
    return np.array([float(np.dot(weights, y)) * of2 for weights in layer.w2[expert]]) + bias


def by_hand(layer: Layer) -> np.ndarray:
    total = np.zeros((TOKENS, HIDDEN))
    for token, slot in np.ndindex(TOKENS, TOP_K):
        expert = int(layer.experts[token, slot]) - layer.first_expert
        if 0 <= expert < EXPERTS:
            weight = 1.0 if layer.final is None else float(layer.final[token, slot])
            total[token] += weight * one_expert(layer, expert, layer.x[token])
    return total


def a_layer(mode: str, activation: str, rng, **more) -> Layer:
    rows = INTER if activation in PLAIN else 2 * INTER
    scales = {
        "fp8": {name: rng.uniform(0.5, 1.5, EXPERTS) for name in ("fc1", "quant", "fc2")},
        "int4": {
            "pre1": rng.uniform(10, 40, HIDDEN), "pre2": rng.uniform(10, 40, INTER),
            "fc1": rng.uniform(0.02, 0.1, EXPERTS), "fc2": rng.uniform(0.02, 0.1, EXPERTS),
        },
    }.get(mode, {})  # fmt: skip
    limits = {
        "alpha": rng.uniform(0.5, 2, EXPERTS), "beta": rng.uniform(-1, 1, EXPERTS),
        "limit": rng.uniform(0.3, 1, EXPERTS),
    }  # fmt: skip
    experts = np.argsort(rng.random((TOKENS, EXPERTS + 2)), axis=1)[:, :TOP_K]
    return Layer(
        mode, rng.standard_normal((TOKENS, HIDDEN)), experts, rng.random(experts.shape) + 0.1,
        rng.standard_normal((EXPERTS, rows, HIDDEN)) / HIDDEN**0.5,
        rng.standard_normal((EXPERTS, HIDDEN, INTER)) / INTER**0.5, np.dtype(np.float16),
        activation, scales, rng.standard_normal((EXPERTS, rows)),
        rng.standard_normal((EXPERTS, HIDDEN)), limits, FIRST, **more,
    )  # fmt: skip


def assert_by_hand(layer: Layer) -> None:
    assert np.allclose(moe(layer)[0], by_hand(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, rng):
    assert_by_hand(a_layer("half", activation, rng))


@pytest.mark.parametrize("mode", ["half", "fp8", "fp8_block_scale", "mxfp4", "int4"])
def test_modes(mode, rng):
    assert_by_hand(a_layer(mode, "Swiglu", rng))
    assert_by_hand(a_layer(mode, "SwigluBias", rng, adds_bias2=False))


def test_without_final_scales(rng):
    layer = a_layer("half", "Swiglu", rng)
    layer.final = None
    assert_by_hand(layer)
