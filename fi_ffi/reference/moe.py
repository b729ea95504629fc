"""Entries of `fused_moe_90` in numpy: a layer's numbers, out of a call's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.function import tensors_of
from fi_ffi.reference import moe_weights
from fi_ffi.reference.arrays import Array, as_array, store
from fi_ffi.reference.exact_moe import Layer, moe

# By FlashInfer's number of each.
ACTIVATIONS = (
    "Gelu", "Relu", "Silu", "Swiglu", "Geglu", "SwigluBias", "Relu2", "SwigluStep", "GegluTanh",
    "Identity",
)  # fmt: skip

_BLOCK = 128
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
