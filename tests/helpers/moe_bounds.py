"""Mixtures of experts in float64, and how far from them the kernels' roundings may lead.

Each step carries a radius that the kernel's value is within.  Roundings are independent of one
another, so what a sum makes of them grows as the root of their squares: five times that, or
their plain sum where it is less.  What is quantised on the way is quantised here: the second
product's input depends on that rounding.  Nothing of it is the package's, which it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, wide
from fi_ffi.reference.moe import Layer

from tests.helpers.rounding import half_step

_SIGMAS = 5.0
_BLOCK = 128
# What of a sum of magnitudes is lost where float32 accumulates, and where Hopper's fp8
# instructions do, which keep about 14 bits: with and without float32 after each 128.
_FLOAT32 = 2.0**-16
ON_HOPPER = {"fp8": 2.0**-11, "fp8_block_scale": 2.0**-12, "int4": 2.0**-12}
# Modes of which all tactics keep results between the products in 16 bits: a rounding that is
# certain is made here too, because what is quantised afterwards depends on it.
_QUANTISING = (
    "fp8", "fp8_block_scale", "int4", "nvfp4", "nvfp4_packed", "fp8_mxfp4", "mxfp8_mxfp4", "mxfp8",
)  # fmt: skip
# How far from the quotient is what Blackwell's kernels round to elements and scales of blocks:
# they multiply by reciprocals that are not the nearest.
_RECIPROCAL = 2.0**-18

_Near = tuple[Array, Array]  # a value, and the radius that the kernel's is within


def _e4m3(value: Array) -> Array:
    clipped = np.clip(value, -448.0, 448.0)
    return wide(clipped.astype(ml_dtypes.float8_e4m3fn))


def _through(rounding: Callable[[Array], Array], value: Array, radius: Array) -> _Near:
    """A value rounded, and what it is at most off by where the rounding goes the other way."""
    middle = rounding(value)
    low, high = middle - rounding(value - radius), rounding(value + radius) - middle
    return middle, np.maximum(low, high)


def _rounded(layer: Layer, value: Array, radius: Array) -> _Near:
    """A value in the layer's dtype, where the kernels of its mode always round to it."""
    return _through(lambda x: wide(x.astype(layer.dtype)), value, radius)


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


def _e2m1(value: Array) -> Array:
    clipped = np.clip(value, -6.0, 6.0)
    return wide(clipped.astype(ml_dtypes.float4_e2m1fn))


def _e8m0(value: Array) -> Array:
    """The least power of 2 that is no less."""
    found: Array = 2.0 ** np.ceil(np.log2(np.maximum(value, 2.0**-127)))
    return found


def _in_blocks(value: Array, radius: Array, size: int, of_all: float | None = None) -> _Near:
    """Quantised with a scale for each block: to 4 bits and e4m3's, where there is a scale of all,
    which stays in; else to fp8 and powers of 2.

    A block's scale follows its largest element, and with a scale of the next number all of its
    elements are others.
    """
    blocks, around = (x.reshape(len(x), -1, size) for x in (value, radius))
    around = around + _RECIPROCAL * np.abs(blocks)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    off = around.max(axis=-1, keepdims=True) + _RECIPROCAL * largest
    all_ = 1.0 if of_all is None else of_all

    def quantised(x: Array, most: Array) -> Array:
        most = np.maximum(most, 0.0)
        if of_all is None:
            scale = _e8m0(most / 448.0)
            return _e4m3(x / scale) * scale
        scale = _e4m3(all_ * most / 6.0)
        return _e2m1(x * all_ / np.where(scale > 0, scale, np.inf)) * scale

    middle = quantised(blocks, largest)
    error = np.zeros_like(middle)
    for most in (largest - off, largest, largest + off):
        for x in (blocks - around, blocks, blocks + around):
            error = np.maximum(error, np.abs(quantised(x, most) - middle))
    return middle.reshape(value.shape), error.reshape(value.shape)


def _times(rows: _Near, weight: Array, accumulated: float) -> _Near:
    """Rows times the rows of a matrix."""
    value, radius = rows
    sure = radius @ np.abs(weight).T
    likely = _SIGMAS * np.sqrt(radius**2 @ (weight**2).T)
    return value @ weight.T, np.minimum(sure, likely) + accumulated * (
        np.abs(value) @ np.abs(weight).T
    )


def _gelu_tanh(x: Array) -> Array:
    found: Array = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return found


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _active(name: str, gate: Array, linear: Array, limits: dict[str, float]) -> Array:
    """FlashInfer's `ActivationType`, by name."""
    limit = limits.get("limit", 7.0 if name == "SwigluStep" else math.inf)
    within, at_most = np.clip(linear, -limit, limit), np.minimum(gate, limit)

    def silu(x: Array, alpha: float = 1.0) -> Array:
        return np.asarray(x * (1 + np.tanh(alpha * x / 2)) / 2)

    def gelu(x: Array) -> Array:
        return np.asarray(x * (1 + _erf(x / math.sqrt(2))) / 2)

    made: dict[str, Callable[[], Any]] = {
        "Identity": lambda: gate,
        "Relu": lambda: np.where(gate > 0, gate, 0.0),
        "Relu2": lambda: np.where(gate > 0, gate, 0.0) ** 2,
        "Silu": lambda: silu(gate),
        "Gelu": lambda: gelu(gate),
        "Swiglu": lambda: silu(gate) * linear,
        "Geglu": lambda: gelu(gate) * linear,
        "GegluTanh": lambda: _gelu_tanh(gate) * linear,
        "SwigluStep": lambda: np.minimum(silu(gate), limit) * within,
        "SwigluBias": lambda: (
            silu(at_most, limits.get("alpha", 1.0)) * (within + limits.get("beta", 0.0))
        ),
    }
    return np.asarray(made[name]())


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
    if "quant" in layer.scales:
        quant = layer.scales["quant"][expert]
        return _quantised(value * quant, radius * quant)
    if layer.mode not in _QUANTISING:
        return value, radius + half_step(np.abs(value) + radius, layer.dtype)
    value, radius = _rounded(layer, value, radius)
    if layer.mode == "fp8_block_scale":
        return _grouped(value, radius)
    if layer.mode.startswith("nvfp4"):
        return _in_blocks(value, radius, 16, layer.scales["all2"][expert])
    if layer.mode.startswith("mxfp8"):
        return _in_blocks(value, radius, 32)
    scale = layer.scales["pre2"]
    return _quantised(*_rounded(layer, value * scale, radius * np.abs(scale)))


def _input(layer: Layer, expert: int, rows: Array) -> _Near:
    nothing = np.zeros_like(rows)
    if layer.mode == "nvfp4":
        return _in_blocks(rows, nothing, 16, layer.scales["all1"][expert])
    if layer.mode == "fp8_block_scale":
        return _grouped(rows, nothing)
    if layer.mode == "int4":
        return _quantised(_rounded(layer, rows * layer.scales["pre1"], nothing)[0], nothing)
    return rows, nothing


def _expert(layer: Layer, expert: int, rows: Array, accumulated: float) -> _Near:
    """What one expert makes of rows, its second bias included."""
    ones = np.ones(len(layer.w1))
    value, radius = _times(_input(layer, expert, rows), layer.w1[expert], accumulated)
    scale = layer.scales.get("fc1", ones)[expert]
    value, radius = value * scale, radius * abs(scale)
    bias = np.zeros(1) if layer.bias1 is None else layer.bias1[expert]
    if layer.mode in _QUANTISING:
        value, radius = _rounded(layer, value, radius)
    else:  # before the bias is added, after it, or not at all
        radius = radius + half_step(np.abs(value) + np.abs(bias) + radius, layer.dtype)
    value = value + bias
    active = _activated(layer, expert, (value, radius))
    value, radius = _times(_between(layer, expert, active), layer.w2[expert], accumulated)
    scale = layer.scales.get("fc2", ones)[expert]
    value, radius = value * scale, radius * abs(scale)
    radius = radius + half_step(np.abs(value) + radius, layer.dtype)
    if layer.bias2 is not None and layer.adds_bias2:
        value = value + layer.bias2[expert]
    return value, radius


def moe(layer: Layer, accumulated: float = _FLOAT32) -> _Near:
    """The results [tokens, hidden], and how far the kernels' may be from each."""
    total = np.zeros((len(layer.x), layer.w2.shape[1]))
    radius, magnitude = np.zeros_like(total), np.zeros_like(total)
    for expert in range(len(layer.w1)):
        tokens, slots = np.nonzero(layer.experts == layer.first_expert + expert)
        if not len(tokens):
            continue
        value, around = _expert(layer, expert, layer.x[tokens], max(accumulated, _FLOAT32))
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
