"""Random layers of experts of every mode: a call's tensors, and the same as float64 numbers.

The numbers are made from the natural weights with ml_dtypes, not with what is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.moe.interface import FOLDED_RELEASES
from fi_ffi.reference.moe import Layer

from tests.helpers.moe_bounds import worst

F8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
U8, I64 = np.dtype(np.uint8), np.dtype(np.int64)
GATED = ("Swiglu", "Geglu", "SwigluBias", "SwigluStep")
PLAIN = ("Gelu", "Relu", "Silu", "Relu2", "Identity")

# Mode, dtype of activations, dtype of results.
MODES = [
    ("half", F16, F16), ("half", BF16, BF16), ("fp8", F8, F16), ("fp8", F8, BF16),
    ("fp8_block_scale", BF16, BF16), ("mxfp4", BF16, BF16),
    ("int4", F16, F16), ("int4", BF16, BF16),
]  # fmt: skip
# Those of Blackwell alone.
BLACKWELL = [
    ("nvfp4", F16, F16), ("nvfp4", BF16, BF16), ("nvfp4_packed", U8, BF16),
    ("nvfp4_packed", I64, F16), ("fp8_mxfp4", F8, F16), ("fp8_mxfp4", F8, BF16),
    ("mxfp8_mxfp4", F8, F16), ("mxfp8_mxfp4", F8, BF16), ("mxfp8", F8, F16), ("mxfp8", F8, BF16),
]  # fmt: skip
EVERY = MODES + BLACKWELL
FLAGS: dict[str, dict[str, bool]] = {
    "half": {},
    "fp8": {},
    "fp8_block_scale": {"use_deepseek_fp8_block_scale": True},
    "mxfp4": {"use_w4_group_scaling": True},
    "int4": {"use_w4_group_scaling": True, "use_packed_weights": True},
    "nvfp4": {},
    "nvfp4_packed": {},
    "fp8_mxfp4": {},
    "mxfp8_mxfp4": {"use_mxfp8_act_scaling": True},
    "mxfp8": {"use_mxfp8_act_scaling": True},
}
# mxfp8's is 64, of which only every other serves as the intermediate size of a gate.
MULTIPLE = {
    "half": 8, "fp8": 16, "fp8_block_scale": 128, "mxfp4": 128, "int4": 128, "nvfp4": 32,
    "nvfp4_packed": 32, "fp8_mxfp4": 128, "mxfp8_mxfp4": 128, "mxfp8": 128,
}  # fmt: skip
# Multiples that 4-bit modes refuse: one step of their kernels.
TOO_SMALL = {"mxfp4": (128,), "int4": (128, 256, 512)}


@dataclass
class Made:
    """A call: its tensors and scales, what it is asked for, and the layer as numbers."""

    tensors: dict[str, np.ndarray]
    scales: list[np.ndarray]
    more: dict[str, Any]
    layer: Layer

    def call(self, place=lambda array: array, **more: Any) -> np.ndarray:
        """Make the call on memory of `place`'s and return the poisoned output it wrote."""
        return self.call_of(fi_ffi.cutlass_fused_moe, place, **more)

    def call_of(self, function: Any, place=lambda array: array, **more: Any) -> Any:
        placed = {name: place(array) for name, array in self.tensors.items()}
        scales = [place(scale) for scale in self.scales] or None
        descs = {name: desc_of(one) for name, one in placed.items()}
        given = None if scales is None else [desc_of(scale) for scale in scales]
        descs.setdefault("token_final_scales", None)
        function(**descs, quant_scales=given, **{**self.more, **more})
        return placed["output"]

    def worst(self, got: np.ndarray) -> float:
        return worst(got, self.layer)


def desc_of(one: Any) -> Any:
    return one.desc() if hasattr(one, "desc") else one


def routing(rng, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts for each token."""
    order = np.argsort(rng.random((tokens, experts)), axis=1)
    return np.ascontiguousarray(order[:, :top_k]).astype(np.int32)


def next_size(mode: str, size: int) -> int:
    while size in TOO_SMALL.get(mode, ()):
        size += MULTIPLE[mode]
    return size


def _poison(shape, dtype) -> np.ndarray:
    out = np.empty(shape, dtype)
    out.view(np.uint8)[...] = 0xFF
    return out


def _number(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def make(
    rng, mode: str, act: np.dtype, out: np.dtype, *, tokens=7, hidden=None, inter=None, experts=5,
    top_k=2, activation="Swiglu", biases=False, final=True, limits=(), chosen=None,
    per_expert_quant=True,
) -> Made:  # fmt: skip
    """A layer with sizes that are a few times what the mode wants multiples of, or those given,
    or the next that the mode has."""
    step = MULTIPLE[mode]
    hidden = next_size(mode, hidden or 2 * step + (0 if step == 128 else 32))
    # Another than the hidden size, or neither would be missed where the other is meant.
    inter = next_size(mode, inter or step * (3 if hidden != step * 3 else 4))
    rows = 2 * inter if activation in (*GATED, "GegluTanh") else inter
    weights = _WEIGHTS[mode](rng, act, experts, rows, hidden, inter)
    ids = routing(rng, tokens, experts, top_k) if chosen is None else chosen
    x, number, sf = _input(rng, mode, act, tokens, hidden)
    tensors = {
        "output": _poison((tokens, hidden), out), "input": x, "token_selected_experts": ids,
        "token_final_scales": rng.random(ids.shape, np.float32) + np.float32(0.1),
        "fc1_expert_weights": weights["fc1"], "fc2_expert_weights": weights["fc2"],
    }  # fmt: skip
    if not final:
        del tensors["token_final_scales"]
    if sf is not None:
        tensors["input_sf"] = sf
    layer = Layer(
        mode, number, ids, _number(tensors["token_final_scales"]) if final else None,
        weights["w1"], weights["w2"], out, activation, weights["numbers"],
    )  # fmt: skip
    if biases:
        for i, size in ((1, rows), (2, hidden)):
            bias = rng.standard_normal((experts, size)).astype(out)
            tensors[f"fc{i}_expert_biases"] = bias
            setattr(layer, f"bias{i}", _number(bias))
    scales = weights["scales"]
    if not per_expert_quant:
        for name, i in SHARED[mode].items():
            scales[i] = np.array(scales[i][0])
            layer.scales[name] = np.repeat(_number(scales[i]), experts)
    if limits:
        layer.limits = {}
        for name, low, high in (("alpha", 0.5, 2.0), ("beta", -1.0, 1.0), ("limit", 0.3, 1.0)):
            if name in limits:
                value = rng.uniform(low, high, experts).astype(np.float32)
                if name == "alpha":  # 1 would change nothing
                    value = np.where(value > 1, value + 0.5, value - 0.25).astype(np.float32)
                tensors[f"swiglu_{name}"] = value
                layer.limits[name] = _number(value)
        if activation == "Swiglu":
            layer.activation = "SwigluBias"
    more = {**FLAGS[mode], "activation_type": activation}
    return Made(tensors, scales, more, layer)


def _half(rng, act, experts, rows, hidden, inter) -> dict[str, Any]:
    fc1 = (rng.standard_normal((experts, rows, hidden)) / np.sqrt(hidden)).astype(act)
    fc2 = (rng.standard_normal((experts, hidden, inter)) / np.sqrt(inter)).astype(act)
    return {"fc1": fc1, "fc2": fc2, "w1": _number(fc1), "w2": _number(fc2), "scales": [],
            "numbers": {}}  # fmt: skip


def _fp8(rng, act, experts, rows, hidden, inter) -> dict[str, Any]:
    fc1 = (8 * rng.standard_normal((experts, rows, hidden))).astype(np.float32).astype(F8)
    fc2 = (8 * rng.standard_normal((experts, hidden, inter))).astype(np.float32).astype(F8)
    per = [rng.uniform(0.5, 1.5, experts) for _ in range(3)]
    sizes = (1 / (8 * np.sqrt(hidden)), 40.0, 1 / (8 * 40 * np.sqrt(inter)))
    scales = [(one * size).astype(np.float32) for one, size in zip(per, sizes, strict=True)]
    scales.append(np.array(rng.uniform(0.5, 1.5), np.float32))
    names = zip(("fc1", "quant", "fc2"), scales[:3], strict=True)
    return {"fc1": fc1, "fc2": fc2, "w1": _number(fc1), "w2": _number(fc2), "scales": scales,
            "numbers": {name: _number(scale) for name, scale in names}}  # fmt: skip


def _block_scale(rng, act, experts, rows, hidden, inter) -> dict[str, Any]:
    made: dict[str, Any] = {"scales": [], "numbers": {}}
    for i, (n, k) in ((1, (rows, hidden)), (2, (hidden, inter))):
        weight = (50 * rng.standard_normal((experts, n, k))).astype(np.float32).astype(F8)
        shape = (experts, -(-n // 128), k // 128)
        scale = (rng.uniform(0.5, 1.5, shape) / (50 * np.sqrt(k))).astype(np.float32)
        wide = np.kron(_number(scale), np.ones((1, 128, 128)))[:, :n, :k]
        made[f"fc{i}"], made[f"w{i}"] = weight, _number(weight) * wide
        made["scales"].append(scale)
    return made


def _packed(codes: np.ndarray) -> np.ndarray:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def interleaved(weight: np.ndarray, quant_type: str) -> np.ndarray:
    found = np.zeros_like(weight)
    fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(weight, found, quant_type)
    return found


def is_folded() -> bool:
    """Whether the release in use folds the scales of 4-bit weights."""
    return is_in(release_in_force(), FOLDED_RELEASES)


def _mxfp4(rng, act, experts, rows, hidden, inter) -> dict[str, Any]:
    made: dict[str, Any] = {"scales": [], "numbers": {}}
    for i, (n, k) in ((1, (rows, hidden)), (2, (hidden, inter))):
        codes = rng.integers(0, 16, (experts, n, k), dtype=np.uint8)
        exponents = rng.integers(121, 125, (experts, n, k // 32), dtype=np.uint8)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        scale = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        made[f"w{i}"] = values * np.repeat(scale, 32, axis=-1)
        made[f"fc{i}"] = interleaved(_packed(codes), "fp4")
        shape = (n // 64, k // 128, 16, 16) if is_folded() else (k // 128, 4 * n)
        target = np.zeros((experts, *shape), np.uint8)
        fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(exponents, target)
        made["scales"].append(target.view(np.int32) if i == 2 else target)
    return made


def _int4(rng, act, experts, rows, hidden, inter) -> dict[str, Any]:
    made: dict[str, Any] = {"numbers": {}}
    scales = []
    for i, (n, k) in ((1, (rows, hidden)), (2, (hidden, inter))):
        codes = rng.integers(0, 16, (experts, n, k), dtype=np.uint8)
        values = (codes.astype(np.int16) ^ 8).astype(np.float64) - 8
        scale = (rng.uniform(0.5, 1.5, (experts, n, k // 128)) / (4 * np.sqrt(k))).astype(BF16)
        made[f"w{i}"] = values * np.repeat(_number(scale), 128, axis=-1)
        made[f"fc{i}"] = interleaved(_packed(codes), "int4")
        groups = k // 128
        factor = 4 if groups % 4 == 0 else 2 if groups % 2 == 0 else 1
        shape = (n // 64, groups, 8, 8) if is_folded() else (groups // factor, n * factor)
        target = np.zeros((experts, *shape), BF16)
        fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(scale, target, 128)
        scales.append(target.view(act) if i == 2 else target)
    pre = [rng.uniform(20, 60, size).astype(act) for size in (hidden, inter)]
    nothing = [np.zeros(0, act) for _ in range(2)]
    alphas = [(rng.uniform(0.5, 1.5, experts) / 40).astype(np.float32) for _ in range(2)]
    made["scales"] = [*scales, pre[0], pre[1][:, None], *nothing, *alphas]
    made["numbers"] = {
        "pre1": _number(pre[0]), "pre2": _number(pre[1]), "fc1": _number(alphas[0]),
        "fc2": _number(alphas[1]),
    }  # fmt: skip
    return made


# Which of the scales may be one for all experts.
SHARED = {
    "fp8": {"quant": 1}, "nvfp4": {"all1": 0, "all2": 3}, "nvfp4_packed": {"all1": 0, "all2": 3},
    "fp8_mxfp4": {"quant": 2},
}  # fmt: skip


def tiles(scales: np.ndarray, rows: int) -> np.ndarray:
    """[..., n, columns] bytes in tiles of 128 rows and 4 columns, of so many rows, which are
    more or less than whole tiles of sizes that are refused.  Where there are none it is poison."""
    whole = -(-scales.shape[-1] // 4) * 4
    # Past a row's end they are multiplied with zeros.
    scales = np.pad(scales, [*[(0, 0)] * (scales.ndim - 1), (0, whole - scales.shape[-1])])
    *lead, n, columns = scales.shape
    most = max(-(-n // 128) * 128, rows)
    found = np.full((*lead, most * whole), 0x7F, np.uint8)
    row, column = np.arange(n)[:, None], np.arange(columns)
    tile = (row // 128 * (whole // 4) + column // 4) * 512
    found[..., tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales
    return np.ascontiguousarray(found[..., : rows * whole]).reshape(*lead, rows, whole)


def _e4m3_bytes(rng, shape, most: float) -> np.ndarray:
    return rng.uniform(most / 4, most, shape).astype(np.float32).astype(F8).view(U8)


def _of_blocks(elements: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    size = elements.shape[-1] // scales.shape[-1]
    return _number(elements) * np.repeat(_number(scales.view(dtype)), size, axis=-1)


def _fp4_codes(rng, shape) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, and the numbers in them."""
    codes = rng.integers(0, 16, shape, dtype=U8)
    return _packed(codes), codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def _input(rng, mode, act, tokens, hidden) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Activations, the numbers they stand for, and their scales where they have some."""
    if mode == "nvfp4_packed":
        x, elements = _fp4_codes(rng, (tokens, hidden))
        scales = _e4m3_bytes(rng, (tokens, hidden // 16), 200.0)
        sf = tiles(scales, -(-tokens // 128) * 128).reshape(-1)
        return x.view(act), _of_blocks(elements, scales, F8), sf
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    if mode in ("mxfp8", "mxfp8_mxfp4"):
        x = (64 * x).astype(F8)
        scales = rng.integers(119, 123, (tokens, hidden // 32), dtype=U8)
        sf = tiles(scales, -(-tokens // 128) * 128).reshape(-1)
        return x, _of_blocks(x, scales, ml_dtypes.float8_e8m0fnu), sf
    x = x.astype(act)
    return x, _number(x), None


def _blocked(rng, act, experts, rows, hidden, inter, *, mode: str) -> dict[str, Any]:
    """Weights of Blackwell's modes: 4 bits in int64, or fp8, and scales in int32."""
    made: dict[str, Any] = {"scales": [], "numbers": {}}
    is_e4m3 = mode.startswith("nvfp4")
    size, dtype = (16, F8) if is_e4m3 else (32, ml_dtypes.float8_e8m0fnu)
    step = 64 if is_e4m3 else 128
    gates = rows // inter
    for i, (n, k) in ((1, (rows, hidden)), (2, (hidden, inter))):
        padded = gates * -(-inter // step) * step if i == 1 else -(-n // 128) * 128
        if mode == "mxfp8":
            weight = (8 * rng.standard_normal((experts, n, k))).astype(np.float32).astype(F8)
            elements, lowest = _number(weight), 117
        else:
            weight, elements = _fp4_codes(rng, (experts, n, k))
            weight, lowest = weight.view(I64), 121
        shape = (experts, n, k // size)
        scales = rng.integers(lowest, lowest + 4, shape, dtype=U8)
        if is_e4m3:
            scales = _e4m3_bytes(rng, shape, 50.0)
        made[f"fc{i}"], made[f"w{i}"] = weight, _of_blocks(elements, scales, dtype)
        of_all = rng.uniform(200, 500, experts) if is_e4m3 else rng.uniform(20, 60, experts)
        alpha = rng.uniform(0.5, 1.5, experts)
        if is_e4m3:  # what both sides are larger by than numbers of about 1
            of_input = 3 * 125 if mode == "nvfp4_packed" and i == 1 else of_all
            alpha = alpha / (of_input * 3 * 32 * np.sqrt(k))
        if mode == "fp8_mxfp4" and i == 2:
            alpha = alpha / 40
        has_of_all = is_e4m3 or (mode == "fp8_mxfp4" and i == 2)
        if has_of_all:
            made["scales"].append(of_all.astype(np.float32))
            name = f"all{i}" if is_e4m3 else "quant"
            made["numbers"][name] = _number(made["scales"][-1])
        made["scales"] += [tiles(scales, padded).view(np.int32), alpha.astype(np.float32)]
        if mode != "mxfp8_mxfp4":  # whose kernels do not look at it
            made["numbers"][f"fc{i}"] = _number(made["scales"][-1])
    return made


_WEIGHTS = {
    "half": _half, "fp8": _fp8, "fp8_block_scale": _block_scale, "mxfp4": _mxfp4, "int4": _int4,
    **{mode: partial(_blocked, mode=mode) for mode in dict.fromkeys(m for m, _, _ in BLACKWELL)},
}  # fmt: skip


def part(made: Made, **changed: Any) -> Made:
    """The same call with other tensors, and its layer with other numbers."""
    tensors = {**made.tensors, **changed.pop("tensors", {})}
    layer = replace(made.layer, **changed.pop("layer", {}))
    return Made(tensors, changed.pop("scales", made.scales), {**made.more, **changed}, layer)


def of_ranks(made: Made, ranks: int) -> list[Made]:
    """A call with the experts of each rank."""
    count = len(made.layer.w1) // ranks

    def own(array, rank):
        is_whole = array.ndim and len(array) == len(made.layer.w1)
        return np.ascontiguousarray(array[rank * count : (rank + 1) * count]) if is_whole else array

    found = []
    for rank in range(ranks):
        tensors = {k: own(v, rank) for k, v in made.tensors.items() if k.startswith("fc")}
        numbers = {
            k: v if k.startswith("pre") else own(v, rank) for k, v in made.layer.scales.items()
        }
        layer = {"w1": own(made.layer.w1, rank), "w2": own(made.layer.w2, rank),
                 "first_expert": rank * count, "scales": numbers}  # fmt: skip
        scales = [
            scale if made.layer.mode == "int4" and i in (2, 3, 4, 5) else own(scale, rank)
            for i, scale in enumerate(made.scales)
        ]
        more = {"ep_size": ranks, "ep_rank": rank}
        found.append(part(made, tensors=tensors, layer=layer, scales=scales, **more))
    return found


def of_tensor_ranks(made: Made, ranks: int) -> list[Made]:
    """A call with the columns of each rank, of a layer with biases."""
    inter = made.layer.w2.shape[-1]
    found = []
    for rank in range(ranks):
        own = slice(rank * inter // ranks, (rank + 1) * inter // ranks)

        def halves(array: np.ndarray, own: slice = own) -> np.ndarray:
            both = array[:, :inter][:, own], array[:, inter:][:, own]
            return np.ascontiguousarray(np.concatenate(both, axis=1))

        tensors = {
            "fc1_expert_weights": halves(made.tensors["fc1_expert_weights"]),
            "fc2_expert_weights": made.tensors["fc2_expert_weights"][..., own].copy(),
            "fc1_expert_biases": halves(made.tensors["fc1_expert_biases"]),
        }
        layer = {"w1": halves(made.layer.w1), "w2": made.layer.w2[..., own],
                 "bias1": halves(made.layer.bias1), "adds_bias2": rank == 0}  # fmt: skip
        found.append(part(made, tensors=tensors, layer=layer, tp_size=ranks, tp_rank=rank))
    return found


def a(mode: str, **more: Any) -> Made:
    """A layer of the first dtypes of a mode."""
    _, act, out = next(one for one in EVERY if one[0] == mode)
    return make(np.random.default_rng(), mode, act, out, **more)


def refused(made: Made, argument: str, kind=fi_ffi.ArgumentError, **more) -> Any:
    """The error of a call, which wrote nothing."""
    with pytest.raises(kind) as caught:
        made.call(**more)
    error = caught.value
    assert error.op == "cutlass_fused_moe"
    assert error.argument == argument, str(error)
    assert str(error.got) in str(error) and str(error.expected) in str(error)
    return error
