"""Mixtures of experts in numpy: float32, rounded where the kernels of `fused_moe_90` round."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.function import tensors_of
from fi_ffi.reference import moe_weights
from fi_ffi.reference.arrays import Array, as_array

# By FlashInfer's number of each.
ACTIVATIONS = (
    "Gelu", "Relu", "Silu", "Swiglu", "Geglu", "SwigluBias", "Relu2", "SwigluStep", "GegluTanh",
    "Identity",
)  # fmt: skip

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_MAX = np.float32(448)
_BLOCK = 128
_STEP_LIMIT = 7.0  # of SwigluStep without a swiglu_limit


def _float32(value: Any) -> Array:
    found: Array = value.astype(np.float32)
    return found


def to_fp8(value: Array) -> Array:
    """The nearest e4m3, as float32; what is beyond its range becomes its largest."""
    return _float32(np.clip(value, -_FP8_MAX, _FP8_MAX).astype(_FP8))


def fp8_groups(value: Array) -> Array:
    """Quantised to e4m3 with a scale for each 128 of a row, and back."""
    groups = _float32(value).reshape(len(value), -1, _BLOCK)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scale = np.where(largest > 0, _FP8_MAX / largest, np.float32(1))
    back: Array = (to_fp8(groups * scale) * (np.float32(1) / scale)).reshape(value.shape)
    return back


def _blocks(weight: Array, scales: Array) -> Array:
    wide = np.repeat(np.repeat(scales, _BLOCK, axis=0), _BLOCK, axis=1)
    rows, columns = weight.shape
    return _product(_float32(weight), wide[:rows, :columns])


def _product(one: Array, other: Any) -> Array:
    found: Array = one * other
    return found


class _Plain:
    """Not quantised; also the part of every mode that is the same."""

    def __init__(self, tensors: Mapping[str, Array], scales: Sequence[Array]) -> None:
        self.fc1, self.fc2 = tensors["fc1_expert_weights"], tensors["fc2_expert_weights"]
        self.dtype, self.scales = tensors["output"].dtype, scales

    def rounded(self, value: Array) -> Array:
        return _float32(value.astype(self.dtype))

    def matrix(self, expert: int, is_first: bool) -> Array:
        """The weights of an expert, as float32."""
        return _float32((self.fc1 if is_first else self.fc2)[expert])

    def first(self, expert: int, rows: Array) -> Array:
        found: Array = _float32(rows) @ self.matrix(expert, True).T
        return found

    def between(self, expert: int, rows: Array) -> Array:
        return self.rounded(rows)

    def second(self, expert: int, rows: Array) -> Array:
        found: Array = rows @ self.matrix(expert, False).T
        return found


class _PerTensor(_Plain):
    def first(self, expert: int, rows: Array) -> Array:
        return _product(super().first(expert, rows), self.scales[0][expert])

    def between(self, expert: int, rows: Array) -> Array:
        quant = self.scales[1]
        return to_fp8(rows * (quant[expert] if quant.ndim else quant))

    def second(self, expert: int, rows: Array) -> Array:
        return _product(super().second(expert, rows), self.scales[2][expert])


class _BlockScale(_Plain):
    def matrix(self, expert: int, is_first: bool) -> Array:
        weight = (self.fc1 if is_first else self.fc2)[expert]
        return _blocks(weight, self.scales[not is_first][expert])

    def first(self, expert: int, rows: Array) -> Array:
        return super().first(expert, fp8_groups(rows))

    def between(self, expert: int, rows: Array) -> Array:
        return fp8_groups(self.rounded(rows))


class _Mxfp4(_Plain):
    def matrix(self, expert: int, is_first: bool) -> Array:
        weight = (self.fc1 if is_first else self.fc2)[expert : expert + 1]
        scales = self.scales[not is_first][expert : expert + 1].view(np.uint8)
        natural = moe_weights.deinterleave(weight, "fp4")
        return moe_weights.mxfp4(
            natural[0], moe_weights.deinterleave_scales(scales, weight.shape[1])[0]
        )


class _Int4(_Plain):
    def matrix(self, expert: int, is_first: bool) -> Array:
        weight = (self.fc1 if is_first else self.fc2)[expert : expert + 1]
        scales = self.scales[not is_first][expert : expert + 1].view(ml_dtypes.bfloat16)
        natural = moe_weights.deinterleave(weight, "int4")
        return moe_weights.int4(
            natural[0], moe_weights.deinterleave_scales(scales, weight.shape[1])[0]
        )

    def _quantised(self, rows: Array, act_scales: Array) -> Array:
        return to_fp8(self.rounded(_float32(rows) * _float32(act_scales)))

    def first(self, expert: int, rows: Array) -> Array:
        quantised = self._quantised(rows, self.scales[2].reshape(-1))
        return _product(super().first(expert, quantised), self.scales[6][expert])

    def between(self, expert: int, rows: Array) -> Array:
        return self._quantised(self.rounded(rows), self.scales[3].reshape(-1))

    def second(self, expert: int, rows: Array) -> Array:
        return _product(super().second(expert, rows), self.scales[7][expert])


_MODES: dict[str, type[_Plain]] = {
    "half": _Plain, "fp8": _PerTensor, "fp8_block_scale": _BlockScale, "mxfp4": _Mxfp4,
    "int4": _Int4,
}  # fmt: skip


_erf = np.frompyfunc(math.erf, 1, 1)
_TANH = np.float32(math.sqrt(2 / math.pi))


def _sigmoid(value: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-value))
    return found


def _gelu(value: Array) -> Array:
    return _product(value / 2, 1 + _float32(_erf(value * np.float32(math.sqrt(0.5)))))


def _gelu_tanh(value: Array) -> Array:
    return _product(value / 2, 1 + np.tanh(_TANH * (value + np.float32(0.044715) * value**3)))


def _relu(value: Array) -> Array:
    found: Array = np.maximum(value, 0)
    return found


_ALONE: dict[str, Callable[[Array], Array]] = {
    "Gelu": _gelu, "Relu": _relu, "Silu": lambda x: _product(x, _sigmoid(x)),
    "Relu2": lambda x: _product(_relu(x), _relu(x)), "Identity": lambda x: x,
    "GeluTanh": _gelu_tanh,
}  # fmt: skip
_GATES = {"Swiglu": "Silu", "Geglu": "Gelu", "GegluTanh": "GeluTanh"}


def activate(name: str, gate: Array, linear: Array, limits: Mapping[str, Any]) -> Array:
    """An activation; of `gate` alone where it has none to multiply."""
    alpha, beta = limits.get("swiglu_alpha", 1.0), limits.get("swiglu_beta", 0.0)
    limit = limits.get("swiglu_limit", _STEP_LIMIT if name == "SwigluStep" else np.inf)
    if name == "SwigluBias":
        clamped: Array = np.minimum(gate, limit)
        gated = clamped * _sigmoid(clamped * alpha)
        return _product(gated, np.clip(linear, -limit, limit) + beta)
    if name == "SwigluStep":
        gated = np.minimum(gate * _sigmoid(gate), limit)
        return _product(gated, np.clip(linear, -limit, limit))
    if name in _GATES:
        return _product(_ALONE[_GATES[name]](gate), linear)
    return _ALONE[name](gate)


def run_moe(
    mode: str, output: Array, input: Array, token_selected_experts: Array,
    token_final_scales: Array | None, fc1_expert_weights: Array, fc1_expert_biases: Array | None,
    fc2_expert_weights: Array, fc2_expert_biases: Array | None, quant_scales: Any, input_sf: None,
    swiglu_alpha: Array | None, swiglu_beta: Array | None, swiglu_limit: Array | None, *more: Any,
) -> None:  # fmt: skip
    """Write `output`; the weights are of this rank's experts."""
    _, _, tp_rank, _, ep_rank, *_, number = more
    scales = [] if quant_scales is None else [as_array(one) for one in tensors_of(quant_scales)]
    given = {
        "fc1_expert_weights": fc1_expert_weights, "fc1_expert_biases": fc1_expert_biases,
        "fc2_expert_weights": fc2_expert_weights, "output": output, "swiglu_alpha": swiglu_alpha,
        "swiglu_beta": swiglu_beta, "swiglu_limit": swiglu_limit,
    }  # fmt: skip
    tensors = {name: array for name, array in given.items() if array is not None}
    experts: _Plain = _MODES[mode](tensors, scales)
    first, count = len(experts.fc1) * ep_rank, len(experts.fc1)
    _check_distinct(token_selected_experts, first, count)
    total = np.zeros(output.shape, np.float32)
    for expert in range(count):
        tokens, slots = np.nonzero(token_selected_experts == first + expert)
        if len(tokens):
            rows = _expert(experts, tensors, ACTIVATIONS[number], expert, input[tokens])
            if tp_rank == 0 and fc2_expert_biases is not None:
                rows = rows + fc2_expert_biases[expert].astype(np.float32)
            final = token_final_scales
            total[tokens] += rows if final is None else rows * final[tokens, slots, None]
    output[...] = total.astype(output.dtype)


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


def _expert(
    experts: _Plain, tensors: Mapping[str, Array], activation: str, expert: int, rows: Array
) -> Array:
    """What one expert makes of its rows, without the second bias."""
    product = experts.rounded(experts.first(expert, rows))
    if "fc1_expert_biases" in tensors:
        product = product + tensors["fc1_expert_biases"][expert].astype(np.float32)
    names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    limits = {name: tensors[name][expert] for name in names if name in tensors}
    inter = tensors["fc2_expert_weights"].shape[-1]
    inter *= 2 if tensors["fc2_expert_weights"].dtype == np.uint8 else 1
    # Where there is a gate it is the second half, and what it multiplies the first.
    gate, linear = product[:, -inter:], product[:, :inter]
    active = activate(activation, gate, linear, limits)
    return experts.rounded(experts.second(expert, experts.between(expert, active)))


def interleave_weights(weight: Array, weight_interleaved: Array, quant_type: int) -> None:
    weight_interleaved[...] = moe_weights.interleave(weight, "fp4" if quant_type else "int4")


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "fused_moe_90": {
        "interleave_moe_weights_for_sm90_mixed_gemm": interleave_weights,
        **{
            f"run_moe.{mode}": functools.wraps(run_moe)(functools.partial(run_moe, mode))
            for mode in _MODES
        },
    },
}
