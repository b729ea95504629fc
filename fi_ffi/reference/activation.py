"""Gated activations in float64, from their definition."""

from __future__ import annotations

import math

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs

# In kernels compiled for fast arithmetic, subnormal float32 numbers are 0, and so are quotients by
# 2^126 or more.
_FLUSHED = 2.0**-126
_TANH = 2.0**-11  # the error of PTX's tanh

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _halves(a: Inputs) -> tuple[Array, Array]:
    d = a["input"].shape[1] // 2
    return a["input"][:, :d], a["input"][:, d:]


def _result(x: Array, y: Array, value: Array, terms: Array) -> Exact:
    """Return a result; `terms` is the sum of the magnitudes of the value's terms."""
    flushed = (1 + np.abs(x)) * (1 + np.abs(y)) * _FLUSHED / SLACK
    return {"out": (value, terms + flushed)}


def silu_and_mul(a: Inputs) -> Exact:
    x, y = _halves(a)
    with np.errstate(over="ignore"):
        value = x / (1 + np.exp(-x)) * y
    return _result(x, y, value, np.abs(value))


def gelu_and_mul(a: Inputs) -> Exact:
    x, y = _halves(a)
    tail = _erf(x / np.sqrt(2))
    return _result(x, y, x * y * (1 + tail) / 2, np.abs(x * y) * (1 + np.abs(tail)) / 2)


def gelu_tanh_and_mul(a: Inputs) -> Exact:
    x, y = _halves(a)
    tail = np.tanh(np.sqrt(2 / np.pi) * x * (1 + 0.044715 * x**2))
    terms = np.abs(x * y) * (1 + np.abs(tail) * (1 + _TANH / SLACK)) / 2
    return _result(x, y, x * y * (1 + tail) / 2, terms)


EXACT: dict[str, Formula] = {
    "silu_and_mul": silu_and_mul,
    "gelu_and_mul": gelu_and_mul,
    "gelu_tanh_and_mul": gelu_tanh_and_mul,
}
