"""Mixtures of experts in float64, and how far from them the kernels' roundings may lead; and the
entries of `fused_moe_90`, which compute a layer out of a call's tensors.

Weights come as the numbers they stand for, an array or what makes one for each expert, and what is
quantised on the way is quantised here: the second product's input depends on that rounding
(`tests/reference/test_moe_formula.py::test_modes`).  Each step carries a radius that the kernel's
value is within.  Roundings are independent of one another, so what a sum makes of them grows as
the root of their squares: five times that, or their plain sum where it is less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.function import tensors_of
from fi_ffi.reference import moe_weights
from fi_ffi.reference.arrays import Array, as_array, store

# By FlashInfer's number of each.
ACTIVATIONS = (
    "Gelu", "Relu", "Silu", "Swiglu", "Geglu", "SwigluBias", "Relu2", "SwigluStep", "GegluTanh",
    "Identity",
)  # fmt: skip

_SIGMAS = 5.0
_BLOCK = 128
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# What of a sum of magnitudes is lost where float32 accumulates, and where Hopper's fp8
# instructions do, which keep about 14 bits: with and without float32 after each 128.
_FLOAT32 = 2.0**-16
ON_HOPPER = {"fp8": 2.0**-11, "fp8_block_scale": 2.0**-12, "int4": 2.0**-12}


@dataclass
class Layer:
    """A layer as its numbers, float64: `x` [tokens, hidden], `w1` [experts, rows, hidden], `w2`
    [experts, hidden, inter]; `dtype` is of the results, and of what is between the products.

    `scales` are the mode's: of fp8 `fc1`, `quant`, `fc2` for each expert; of int4 `pre1` and
    `pre2` for each column, `fc1` and `fc2` for each expert.
    """

    mode: str
    x: Array
    experts: Array
    final: Array | None
    w1: Any
    w2: Any
    dtype: Any
    activation: str
    scales: dict[str, Array]
    bias1: Array | None = None
    bias2: Array | None = None
    limits: dict[str, Array] | None = None
    first_expert: int = 0
    adds_bias2: bool = True
    accumulated: float = _FLOAT32


# Modes of which all tactics keep results between the products in 16 bits: a rounding that is
# certain is made here too, because what is quantised afterwards depends on it.
_QUANTISING = ("fp8", "fp8_block_scale", "int4")

_Near = tuple[Array, Array]  # a value, and the radius that the kernel's is within


def half_step(value: Array, dtype: Any) -> Array:
    """Half a step of a 16-bit dtype at a value."""
    info = ml_dtypes.finfo(dtype)
    step: Array = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal)) / 2
    return step * 1.001


def _in(value: Array, dtype: Any) -> Array:
    found: Array = value.astype(dtype).astype(np.float64)
    return found


def _e4m3(value: Array) -> Array:
    return _in(np.clip(value, -448.0, 448.0), _E4M3)


def _through(rounding: Callable[[Array], Array], value: Array, radius: Array) -> _Near:
    """A value rounded, and what it is at most off by where the rounding goes the other way."""
    middle = rounding(value)
    low, high = middle - rounding(value - radius), rounding(value + radius) - middle
    return middle, np.maximum(low, high)


def _rounded(layer: Layer, value: Array, radius: Array) -> _Near:
    """A value in the layer's dtype, where the kernels of its mode always round to it."""
    return _through(lambda x: _in(x, layer.dtype), value, radius)


def _quantised(value: Array, radius: Array) -> _Near:
    return _through(_e4m3, value, radius)


def _grouped(value: Array, radius: Array) -> _Near:
    """Quantised with a scale for each 128, and back."""
    groups, around = value.reshape(len(value), -1, _BLOCK), radius.reshape(len(value), -1, _BLOCK)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    # The scale is the largest's, and so is its error.
    at = np.abs(groups).argmax(axis=-1)[..., None]
    off = np.take_along_axis(around, at, axis=-1) / np.maximum(largest, 1e-300) + 2.0**-22
    scale = np.where(largest > 0, 448.0 / np.maximum(largest, 1e-300), 1.0)
    scaled = groups * scale
    middle, step = _quantised(scaled, around * scale + np.abs(scaled) * off)
    back, error = middle / scale, step / scale + np.abs(middle / scale) * off
    return back.reshape(value.shape), error.reshape(value.shape)


def _times(rows: _Near, weight: Array, accumulated: float) -> _Near:
    """Rows times the rows of a matrix."""
    value, radius = rows
    sure = radius @ np.abs(weight).T
    likely = _SIGMAS * np.sqrt(radius**2 @ (weight**2).T)
    return value @ weight.T, np.minimum(sure, likely) + accumulated * (
        np.abs(value) @ np.abs(weight).T
    )


def _sigmoid(value: Array) -> Array:
    found: Array = 0.5 * (1 + np.tanh(value / 2))
    return found


_erf = np.frompyfunc(math.erf, 1, 1)


def _gelu(value: Array) -> Array:
    found: Array = 0.5 * value * (1 + np.asarray(_erf(value / math.sqrt(2)), np.float64))
    return found


def _gelu_tanh(value: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    found: Array = 0.5 * value * (1 + np.tanh(inner))
    return found


def _active(name: str, gate: Array, linear: Array, limits: dict[str, float]) -> Array:
    """FlashInfer's `ActivationType`, by name."""
    limit = limits.get("limit", 7.0 if name == "SwigluStep" else math.inf)
    plain: dict[str, Callable[[Array], Any]] = {
        "Gelu": _gelu, "Relu": lambda x: np.maximum(x, 0), "Silu": lambda x: x * _sigmoid(x),
        "Relu2": lambda x: np.maximum(x, 0) ** 2, "Identity": lambda x: x,
    }  # fmt: skip
    if name in plain:
        return np.asarray(plain[name](gate))
    if name == "SwigluBias":
        gate = np.minimum(gate, limit)
        linear = np.clip(linear, -limit, limit) + limits.get("beta", 0.0)
        return np.asarray(gate * _sigmoid(limits.get("alpha", 1.0) * gate) * linear)
    if name == "SwigluStep":
        silu = np.minimum(gate * _sigmoid(gate), limit)
        return np.asarray(silu * np.clip(linear, -limit, limit))
    gated = {"Swiglu": plain["Silu"], "Geglu": _gelu, "GegluTanh": _gelu_tanh}
    return np.asarray(gated[name](gate) * linear)


def _activated(layer: Layer, expert: int, product: _Near) -> _Near:
    """The activation, and the farthest that it is at the corners of what may be its inputs."""
    limits = {name: float(each[expert]) for name, each in (layer.limits or {}).items()}
    value, radius = product
    inter = layer.w2.shape[-1]
    gate, linear = value[:, -inter:], value[:, :inter]
    around, beside = radius[:, -inter:], radius[:, :inter]
    middle = _active(layer.activation, gate, linear, limits)
    farthest = np.zeros_like(middle)
    for i in (-1, 0, 1):
        for j in (-1, 1):
            corner = _active(layer.activation, gate + i * around, linear + j * beside, limits)
            farthest = np.maximum(farthest, np.abs(corner - middle))
    if layer.activation == "Gelu":  # other tactics have the approximation
        farthest = farthest + np.abs(_gelu_tanh(gate) - middle)
    return middle, 1.05 * farthest + _FLOAT32 * np.abs(middle)


def _between(layer: Layer, expert: int, active: _Near) -> _Near:
    """What goes into the second product."""
    value, radius = active
    if layer.mode == "fp8":
        quant = layer.scales["quant"][expert]
        return _quantised(value * quant, radius * quant)
    if layer.mode not in _QUANTISING:
        return value, radius + half_step(np.abs(value) + radius, layer.dtype)
    value, radius = _rounded(layer, value, radius)
    if layer.mode == "fp8_block_scale":
        return _grouped(value, radius)
    scale = layer.scales["pre2"]
    return _quantised(*_rounded(layer, value * scale, radius * np.abs(scale)))


def _input(layer: Layer, rows: Array) -> _Near:
    nothing = np.zeros_like(rows)
    if layer.mode == "fp8_block_scale":
        return _grouped(rows, nothing)
    if layer.mode == "int4":
        return _quantised(_in(rows * layer.scales["pre1"], layer.dtype), nothing)
    return rows, nothing


def _expert(layer: Layer, expert: int, rows: Array) -> _Near:
    """What one expert makes of rows, its second bias included."""
    ones = np.ones(len(layer.w1))
    value, radius = _times(_input(layer, rows), layer.w1[expert], layer.accumulated)
    scale = layer.scales.get("fc1", ones)[expert]
    value, radius = value * scale, radius * abs(scale)
    bias = np.zeros(1) if layer.bias1 is None else layer.bias1[expert]
    if layer.mode in _QUANTISING:
        value, radius = _rounded(layer, value, radius)
    else:  # before the bias is added, after it, or not at all
        radius = radius + half_step(np.abs(value) + np.abs(bias) + radius, layer.dtype)
    value = value + bias
    active = _activated(layer, expert, (value, radius))
    value, radius = _times(_between(layer, expert, active), layer.w2[expert], layer.accumulated)
    scale = layer.scales.get("fc2", ones)[expert]
    value, radius = value * scale, radius * abs(scale)
    radius = radius + half_step(np.abs(value) + radius, layer.dtype)
    if layer.bias2 is not None and layer.adds_bias2:
        value = value + layer.bias2[expert]
    return value, radius


def moe(layer: Layer) -> _Near:
    """The results [tokens, hidden], and how far the kernels' may be from each."""
    total = np.zeros((len(layer.x), layer.w2.shape[1]))
    radius, magnitude = np.zeros_like(total), np.zeros_like(total)
    for expert in range(len(layer.w1)):
        tokens, slots = np.nonzero(layer.experts == layer.first_expert + expert)
        if not len(tokens):
            continue
        value, around = _expert(layer, expert, layer.x[tokens])
        weight = np.ones((len(tokens), 1))
        if layer.final is not None:
            weight = layer.final[tokens, slots][:, None].astype(np.float64)
        total[tokens] += weight * value
        radius[tokens] += np.abs(weight) * around
        magnitude[tokens] += np.abs(weight * value)
    # Tactics that sum in the epilogue round each term, and each sum.
    sums = layer.experts.shape[1] + 1 if layer.experts.shape[1] > 1 else 1
    return total, radius + sums * half_step(magnitude + radius, layer.dtype)


def worst(got: Array, layer: Layer) -> float:
    """The largest error as a fraction of what is allowed; infinite where it is no number."""
    expected, allowed = moe(layer)
    error = np.abs(got.astype(np.float64) - expected) / np.maximum(allowed, 1e-300)
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


_Matrix = Callable[[int], Array]


class _Matrices:
    """Every expert's weights as the numbers they stand for, made when they are asked for."""

    def __init__(self, weight: Array, matrix: _Matrix, is_packed: bool) -> None:
        experts, rows, columns = weight.shape
        self.shape: tuple[int, int, int] = experts, rows, columns * (2 if is_packed else 1)
        self._matrix = matrix

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Array:
        return self._matrix(expert).astype(np.float64)


def _matrix(mode: str, weight: Array, scales: Sequence[Array], i: int) -> _Matrix:
    """Of an expert, its matrix of product `i`."""

    def blocks(expert: int) -> Array:
        wide = np.kron(scales[i][expert], np.ones((_BLOCK, _BLOCK)))
        rows, columns = weight.shape[1:]
        found: Array = weight[expert].astype(np.float64) * wide[:rows, :columns]
        return found

    def packed(expert: int) -> Array:
        quant_type, dtype, decode = _PACKED[mode]
        one = slice(expert, expert + 1)
        natural = moe_weights.deinterleave(weight[one], quant_type)
        of_groups = scales[i][one].view(dtype)
        return decode(natural[0], moe_weights.deinterleave_scales(of_groups, weight.shape[1])[0])

    if mode == "fp8_block_scale":
        return blocks
    return packed if mode in _PACKED else lambda expert: weight[expert]


# Of modes with weights of 4 bits: their kind, the dtype of their scales, and what decodes them.
_PACKED: dict[str, tuple[str, Any, Callable[[Array, Array], Array]]] = {
    "mxfp4": ("fp4", np.uint8, moe_weights.mxfp4),
    "int4": ("int4", ml_dtypes.bfloat16, moe_weights.int4),
}
# Which of a call's scales a layer has by which name.
_SCALES: dict[str, dict[str, int]] = {
    "half": {}, "fp8": {"fc1": 0, "quant": 1, "fc2": 2}, "fp8_block_scale": {}, "mxfp4": {},
    "int4": {"pre1": 2, "pre2": 3, "fc1": 6, "fc2": 7},
}  # fmt: skip


def _numbers(mode: str, scales: Sequence[Array], experts: int) -> dict[str, Array]:
    found = {name: np.ravel(scales[i]).astype(np.float64) for name, i in _SCALES[mode].items()}
    if "quant" in found:  # one for all, or one for each
        found["quant"] = np.broadcast_to(found["quant"], experts)
    return found


def run_moe(
    mode: str, output: Array, input: Array, token_selected_experts: Array,
    token_final_scales: Array | None, fc1_expert_weights: Array, fc1_expert_biases: Array | None,
    fc2_expert_weights: Array, fc2_expert_biases: Array | None, quant_scales: Any, input_sf: None,
    swiglu_alpha: Array | None, swiglu_beta: Array | None, swiglu_limit: Array | None, *more: Any,
) -> None:  # fmt: skip
    """Write `output`; the weights are of this rank's experts."""
    _, _, tp_rank, _, ep_rank, *_, number = more
    scales = [] if quant_scales is None else [as_array(one) for one in tensors_of(quant_scales)]
    count = len(fc1_expert_weights)
    first = count * ep_rank
    _check_distinct(token_selected_experts, first, count)
    limits = {"alpha": swiglu_alpha, "beta": swiglu_beta, "limit": swiglu_limit}
    w1, w2 = (
        _Matrices(weight, _matrix(mode, weight, scales, i), mode in _PACKED)
        for i, weight in enumerate((fc1_expert_weights, fc2_expert_weights))
    )
    layer = Layer(
        mode,
        input.astype(np.float64),
        token_selected_experts,
        token_final_scales,
        w1,
        w2,
        output.dtype,
        ACTIVATIONS[number],
        _numbers(mode, scales, count),
        _number(fc1_expert_biases),
        _number(fc2_expert_biases),
        {name: each for name, each in limits.items() if each is not None},
        first,
        adds_bias2=tp_rank == 0,
    )
    store(output, moe(layer)[0])


def _number(array: Array | None) -> Array | None:
    return None if array is None else array.astype(np.float64)


def _check_distinct(experts: Array, first: int, count: int) -> None:
    """Raise where a token has one of this rank's experts twice.

    What the kernels do then depends on the number of tokens; on a GPU nobody can look.
    """
    ordered = np.sort(experts, axis=1)
    before, after = ordered[:, :-1], ordered[:, 1:]
    twice = (before == after) & (before >= first) & (before < first + count)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        raise ValueError(f"an expert twice for token {row}")


def interleave_weights(weight: Array, weight_interleaved: Array, quant_type: int) -> None:
    weight_interleaved[...] = moe_weights.interleave(weight, "fp4" if quant_type else "int4")


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "fused_moe_90": {
        "interleave_moe_weights_for_sm90_mixed_gemm": interleave_weights,
        **{
            f"run_moe.{mode}": functools.wraps(run_moe)(functools.partial(run_moe, mode))
            for mode in _SCALES
        },
    },
}
