"""The modules of gated activations in numpy, in float32 as `jit/activation.py` has them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fi_ffi.reference.arrays import Array, store

_HALF, _ONE = np.float32(0.5), np.float32(1)
_erf = np.vectorize(math.erf, otypes=[np.float32])


def _silu(x: Array) -> Array:
    result: Array = x / (_ONE + np.exp(-x))
    return result


def _gelu(x: Array) -> Array:
    result: Array = x * _HALF * (_ONE + _erf(x * np.float32(0.5**0.5)))
    return result


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    result: Array = x * (_HALF * (_ONE + np.tanh(inner)))
    return result


def _kernel(activation: Callable[[Array], Array]) -> Callable[[Array, Array, bool], None]:
    def kernel(out: Array, input: Array, enable_pdl: bool) -> None:
        gate, factor = np.split(input.astype(np.float32), 2, axis=1)
        store(out, activation(gate) * factor)

    return kernel


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    f"{name}_and_mul": {f"{name}_and_mul": _kernel(function)}
    for name, function in _ACTIVATIONS.items()
}
