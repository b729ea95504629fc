"""Mixtures of experts in float64, and the entries of `fused_moe_90`, which compute a layer from a
call's tensors.

Weights are passed as their values: an array, or a function that returns the matrix of an expert.
Roundings and quantisations that all kernels make are made here too, because the second product's
input depends on them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import array_values
from fi_ffi.reference import moe_blocks, moe_weights
from fi_ffi.reference.arrays import Array, as_array, store, wide

# In the order of FlashInfer's numbers.
ACTIVATIONS = (
    "Gelu",
    "Relu",
    "Silu",
    "Swiglu",
    "Geglu",
    "SwigluBias",
    "Relu2",
    "SwigluStep",
    "GegluTanh",
    "Identity",
)

_BLOCK = 128
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass
class Layer:
    """A layer as values in float64: `x` [tokens, hidden], `w1` [experts, rows, hidden], `w2`
    [experts, hidden, inter].

    `dtype` is that of results and of intermediate values. `scales` depends on the mode. For fp8:
    `fc1`, `quant`, `fc2` for each expert. For int4: `pre1` and `pre2` for each column, `fc1` and
    `fc2` for each expert. For block scales: `fc1` and `fc2`, and `all1` and `all2`, the tensor-wide
    scales with which activations are quantised, for each expert.
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


# Modes in which all kernels keep the values between the products in 16 bits.
_QUANTISING = (
    "fp8",
    "fp8_block_scale",
    "int4",
    "nvfp4",
    "nvfp4_packed",
    "fp8_mxfp4",
    "mxfp8_mxfp4",
    "mxfp8",
)
# By mode: the format of activations (given or quantised to), and that of weights.
_BLOCKED = {
    "nvfp4": (moe_blocks.NVFP4, moe_blocks.NVFP4),
    "fp8_mxfp4": (None, moe_blocks.MXFP4),
    "nvfp4_packed": (moe_blocks.NVFP4, moe_blocks.NVFP4),
    "mxfp8_mxfp4": (moe_blocks.MXFP8, moe_blocks.MXFP4),
    "mxfp8": (moe_blocks.MXFP8, moe_blocks.MXFP8),
}


def _in(value: Array, dtype: Any) -> Array:
    rounded: Array = wide(value.astype(dtype))
    return rounded


def _e4m3(value: Array) -> Array:
    return _in(np.clip(value, -448.0, 448.0), _E4M3)


def _grouped(value: Array) -> Array:
    """Quantise with a scale for each 128, and dequantise."""
    groups = value.reshape(len(value), -1, _BLOCK)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scale = np.where(largest > 0, 448.0 / np.maximum(largest, 1e-300), 1.0)
    back: Array = (_e4m3(groups * scale) / scale).reshape(value.shape)
    return back


def _sigmoid(value: Array) -> Array:
    result: Array = 0.5 * (1 + np.tanh(value / 2))
    return result


_erf = np.frompyfunc(math.erf, 1, 1)


def _gelu(value: Array) -> Array:
    result: Array = 0.5 * value * (1 + np.asarray(_erf(value / math.sqrt(2)), np.float64))
    return result


def _gelu_tanh(value: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    result: Array = 0.5 * value * (1 + np.tanh(inner))
    return result


def _active(name: str, gate: Array, linear: Array, limits: dict[str, float]) -> Array:
    """Apply FlashInfer's `ActivationType`, by name."""
    limit = limits.get("limit", 7.0 if name == "SwigluStep" else math.inf)
    plain: dict[str, Callable[[Array], Any]] = {
        "Gelu": _gelu,
        "Relu": lambda x: np.maximum(x, 0),
        "Silu": lambda x: x * _sigmoid(x),
        "Relu2": lambda x: np.maximum(x, 0) ** 2,
        "Identity": lambda x: x,
    }
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


def _between(layer: Layer, expert: int, value: Array) -> Array:
    """Return the input of the second product."""
    if "quant" in layer.scales:
        return _e4m3(value * layer.scales["quant"][expert])
    if layer.mode not in _QUANTISING:
        return value
    value = _in(value, layer.dtype)
    to, _ = _BLOCKED.get(layer.mode, (None, None))
    if to is not None:
        return to.quantised(value, _of_all(layer, "all2", expert))
    if layer.mode == "fp8_block_scale":
        return _grouped(value)
    return _e4m3(_in(value * layer.scales["pre2"], layer.dtype))


def _of_all(layer: Layer, name: str, expert: int) -> float:
    return float(layer.scales[name][expert]) if name in layer.scales else 1.0


def _input(layer: Layer, expert: int, rows: Array) -> Array:
    if layer.mode == "nvfp4":
        return moe_blocks.NVFP4.quantised(rows, _of_all(layer, "all1", expert))
    if layer.mode == "fp8_block_scale":
        return _grouped(rows)
    return _e4m3(_in(rows * layer.scales["pre1"], layer.dtype)) if layer.mode == "int4" else rows


def _expert(layer: Layer, expert: int, rows: Array) -> Array:
    """Return an expert's output for these rows, second bias included."""
    ones, inter = np.ones(len(layer.w1)), layer.w2.shape[-1]
    value = _input(layer, expert, rows) @ layer.w1[expert].T * layer.scales.get("fc1", ones)[expert]
    if layer.mode in _QUANTISING:
        value = _in(value, layer.dtype)
    if layer.bias1 is not None:
        value = value + layer.bias1[expert]
    limits = {name: float(each[expert]) for name, each in (layer.limits or {}).items()}
    # The second half is the gate, the first half is linear.
    active = _active(layer.activation, value[:, -inter:], value[:, :inter], limits)
    value = _between(layer, expert, active) @ layer.w2[expert].T
    value = value * layer.scales.get("fc2", ones)[expert]
    if layer.bias2 is not None and layer.adds_bias2:
        value = value + layer.bias2[expert]
    return np.asarray(value)


def moe(layer: Layer) -> Array:
    """Compute the results [tokens, hidden]."""
    total = np.zeros((len(layer.x), layer.w2.shape[1]))
    for expert in range(len(layer.w1)):
        tokens, slots = np.nonzero(layer.experts == layer.first_expert + expert)
        if not len(tokens):
            continue
        weight = np.ones((len(tokens), 1))
        if layer.final is not None:
            weight = layer.final[tokens, slots][:, None].astype(np.float64)
        total[tokens] += weight * _expert(layer, expert, layer.x[tokens])
    return total


_Matrix = Callable[[int], Array]


# Values in an element of packed weights.
_HELD = {"uint8": 2, "int64": 16}


class _Matrices:
    """Every expert's weights as values, computed on access."""

    def __init__(self, weight: Array, matrix: _Matrix) -> None:
        experts, rows, columns = weight.shape
        self.shape: tuple[int, int, int] = experts, rows, columns * _HELD.get(weight.dtype.name, 1)
        self._matrix = matrix

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Array:
        return wide(self._matrix(expert))


def _matrix(mode: str, weight: Array, scales: Sequence[Array], i: int) -> _Matrix:
    """Return a function of an expert that returns its matrix for product `i`."""
    if mode in _BLOCKED:
        of_blocks = [scale for scale in scales if scale.ndim == 3]
        return moe_blocks.matrices(weight, of_blocks[i], _BLOCKED[mode][1])

    def blocks(expert: int) -> Array:
        scale = np.kron(scales[i][expert], np.ones((_BLOCK, _BLOCK)))
        rows, columns = weight.shape[1:]
        matrix: Array = wide(weight[expert]) * scale[:rows, :columns]
        return matrix

    def packed(expert: int) -> Array:
        quant_type, dtype, decode = _PACKED[mode]
        one = slice(expert, expert + 1)
        of_groups = scales[i][one].view(dtype)
        if of_groups.ndim == 5:
            natural = moe_weights.deinterleave(weight[one], quant_type, is_folded=True)
            return decode(natural[0], moe_weights.unfold_scales(of_groups)[0])
        natural = moe_weights.deinterleave(weight[one], quant_type)
        return decode(natural[0], moe_weights.deinterleave_scales(of_groups, weight.shape[1])[0])

    if mode == "fp8_block_scale":
        return blocks
    return packed if mode in _PACKED else lambda expert: weight[expert]


# By mode with 4-bit weights: their kind, the dtype of their scales, and the decoder.
_PACKED: dict[str, tuple[str, Any, Callable[[Array, Array], Array]]] = {
    "mxfp4": ("fp4", np.uint8, moe_weights.mxfp4),
    "int4": ("int4", ml_dtypes.bfloat16, moe_weights.int4),
}
# The index of each of a layer's scales among a call's scales, by mode.
_SCALES: dict[str, dict[str, int]] = {
    "half": {},
    "fp8": {"fc1": 0, "quant": 1, "fc2": 2},
    "fp8_block_scale": {},
    "mxfp4": {},
    "int4": {"pre1": 2, "pre2": 3, "fc1": 6, "fc2": 7},
    "nvfp4": {"all1": 0, "fc1": 2, "all2": 3, "fc2": 5},
    "nvfp4_packed": {"fc1": 2, "all2": 3, "fc2": 5},
    "fp8_mxfp4": {"fc1": 1, "quant": 2, "fc2": 4},
    "mxfp8_mxfp4": {},  # the kernels ignore the factors of the products
    "mxfp8": {"fc1": 1, "fc2": 3},
}
# Scales with one value for all experts, or one for each.
_SHARED = ("quant", "all1", "all2")


def _numbers(mode: str, scales: Sequence[Array], experts: int) -> dict[str, Array]:
    numbers = {name: np.ravel(scales[i]).astype(np.float64) for name, i in _SCALES[mode].items()}
    return numbers | {
        name: np.broadcast_to(numbers[name], experts) for name in _SHARED if name in numbers
    }


def run_moe(
    mode: str,
    output: Array,
    input: Array,
    token_selected_experts: Array,
    token_final_scales: Array | None,
    fc1_expert_weights: Array,
    fc1_expert_biases: Array | None,
    fc2_expert_weights: Array,
    fc2_expert_biases: Array | None,
    quant_scales: Any,
    input_sf: Array | None,
    swiglu_alpha: Array | None,
    swiglu_beta: Array | None,
    swiglu_limit: Array | None,
    swizzled_input_sf: bool,
    tp_size: int,
    tp_rank: int,
    ep_size: int,
    ep_rank: int,
    *more: Any,
) -> None:
    """Write `output`; the weights are those of this rank's experts."""
    *_, number = more
    given = [] if quant_scales is None else array_values(quant_scales)
    scales = [as_array(one.described()) for one in given]
    count = len(fc1_expert_weights)
    first = count * ep_rank
    _check_distinct(token_selected_experts, first, count)
    limits = {"alpha": swiglu_alpha, "beta": swiglu_beta, "limit": swiglu_limit}
    w1, w2 = (
        _Matrices(weight, _matrix(mode, weight, scales, i))
        for i, weight in enumerate((fc1_expert_weights, fc2_expert_weights))
    )
    x = input
    if input_sf is not None:
        of, _ = _BLOCKED[mode]
        assert of is not None
        x = moe_blocks.activations(input, input_sf, swizzled_input_sf, of)
    layer = Layer(
        mode,
        x.astype(np.float64),
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
    store(output, moe(layer))


def _number(array: Array | None) -> Array | None:
    return None if array is None else array.astype(np.float64)


def _check_distinct(experts: Array, first: int, count: int) -> None:
    """Raise if a token has one of this rank's experts twice.

    The kernels' result then depends on the number of tokens; on a GPU it cannot be checked.
    """
    ordered = np.sort(experts, axis=1)
    before, after = ordered[:, :-1], ordered[:, 1:]
    twice = (before == after) & (before >= first) & (before < first + count)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        raise ValueError(f"an expert twice for token {row}")


def interleave_weights(
    weight: Array, weight_interleaved: Array, quant_type: int, is_folded: bool = False
) -> None:
    kind = "fp4" if quant_type else "int4"
    weight_interleaved[...] = moe_weights.interleave(weight, kind, is_folded)


def _at(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Make an array over memory that a table points to."""
    count = math.prod(shape) * dtype.itemsize
    memory = ffi.buffer(ffi.cast("char *", int(address)), count)
    return np.frombuffer(memory, dtype).reshape(shape).astype(np.float64)


def _pairs(tokens: Array, adapters: Array) -> list[tuple[int, int, int]]:
    """Return the pairs whose token has an adapter, with both."""
    known = [(i, int(t)) for i, t in enumerate(tokens) if 0 <= t < len(adapters)]
    return [(i, t, int(adapters[t])) for i, t in known if adapters[t] >= 0]


def bgmv_moe_shrink(
    y: Array,
    x: Array,
    w_ptr: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    lora_indices: Array,
    lora_stride: int,
    per_pair_input: bool = False,
) -> None:
    shape = y.shape[2], x.shape[1]
    for i in range(len(y)):
        for pair, token, adapter in _pairs(sorted_token_ids, lora_indices):
            address = w_ptr[i, expert_ids[pair]] + adapter * lora_stride * x.itemsize
            product = _at(address, shape, x.dtype) @ x[token].astype(np.float64)
            store(y[i, pair], y[i, pair].astype(np.float64) + product)


def bgmv_moe_expand(
    y: Array,
    x: Array,
    w_ptr: Array,
    sorted_token_ids: Array,
    expert_ids: Array,
    topk_weights: Array,
    lora_indices: Array,
    slice_start_loc: Array,
    first_feat_out: int,
    lora_stride: int,
    finalize: bool = True,
) -> None:
    shape = first_feat_out, x.shape[2]
    total = y.astype(np.float64)
    for i, start in enumerate(slice_start_loc):
        for pair, token, adapter in _pairs(sorted_token_ids, lora_indices):
            address = w_ptr[i, expert_ids[pair]] + adapter * lora_stride * x.itemsize
            product = _at(address, shape, x.dtype) @ x[i, pair].astype(np.float64)
            total[token, start : start + first_feat_out] += product * float(topk_weights[pair])
    store(y, total)


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "bgmv_moe": {"bgmv_moe_shrink": bgmv_moe_shrink, "bgmv_moe_expand": bgmv_moe_expand},
    "fused_moe_90": {
        "interleave_moe_weights_for_sm90_mixed_gemm": interleave_weights,
        "interleave_moe_weights_for_sm90_mixed_gemm.folded": functools.wraps(interleave_weights)(
            functools.partial(interleave_weights, is_folded=True)
        ),
        **{
            f"run_moe.{mode}": functools.wraps(run_moe)(functools.partial(run_moe, mode))
            for mode in _SCALES
        },
    },
}
