"""Blocks with a scale each, from their formats' definitions: see exact.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs, Judge, Move


def _small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A number with a sign, an exponent and a mantissa, as IEEE 754 orders them."""
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = divmod(code % 2 ** (exponent_bits + mantissa_bits), 2**mantissa_bits)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    return sign * math.ldexp(fraction, max(exponent, 1) - bias)


_E2M1 = np.array([_small_float(code, 2, 1) for code in range(16)])
_E4M3 = np.array([_small_float(code, 4, 3) for code in range(256)])
_E4M3[[127, 255]] = np.nan
_FINITE = np.unique(_E4M3[np.isfinite(_E4M3)])


def nvfp4_kv_dequant(a: Inputs) -> Exact:
    data = a["fp4_data"].astype(int)
    values = np.empty((len(data), 2 * data.shape[1]))
    values[:, 0::2], values[:, 1::2] = _E2M1[data % 16], _E2M1[data // 16]
    scales = a["block_scales"]
    if "block_scales" not in a["largest"]:  # bytes
        scales = _E4M3[scales.astype(int)]
    value = values * scales.repeat(16, axis=1) * a["global_scale"]
    return {"output": (value, np.abs(value))}


def _in_tiles(scales: Array, tile: int) -> Array:
    """Scales of matrices, tile after tile, and 0 where a tile has none."""
    experts, rows, cols = scales.shape
    whole = np.zeros((experts, -(-rows // tile) * tile, -(-cols // 4) * 4), scales.dtype)
    whole[:, :rows, :cols] = scales
    groups = max(tile // 32, 1)
    tiles, columns = whole.shape[1] // tile, whole.shape[2] // 4
    split = whole.reshape(experts, tiles, groups, tile // groups, columns, 4)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 3, 2, 5)).reshape(-1)


def block_scale_interleave(a: Inputs) -> dict[str, Array]:
    return {"interleavedBlockScale": _in_tiles(a["blockScale"], 128)}


def block_scale_interleave_reverse(a: Inputs) -> dict[str, Array]:
    tiled = a["blockScale"]
    count = math.prod(tiled.shape[1:])
    back = np.argsort(_in_tiles(np.arange(count).reshape(1, *tiled.shape[1:]), 128))
    return {"reversedBlockScale": tiled.reshape(len(tiled), count)[:, back].reshape(tiled.shape)}


# Scales and quotients are computed in float32, by reciprocals that are not the nearest.
_NEAR = 2.0**-18


def _nearest(grid: Array, x: Array) -> Array:
    found: Array = grid[np.abs(grid - x[..., None]).argmin(axis=-1)]
    return found


def _as_e4m3(x: Array) -> tuple[Array, Array]:
    """What a scale may be rounded to: all but always twice the same."""
    low, high = (_nearest(_FINITE[_FINITE >= 0], x * (1 + by)) for by in (-_NEAR, _NEAR))
    return low, high


def _as_powers(x: Array) -> tuple[Array, Array]:
    def least(x: Array) -> Array:
        power: Array = 2.0 ** np.ceil(np.log2(np.maximum(x, 2.0**-127)))
        return power

    return least(x * (1 - _NEAR)), least(x * (1 + _NEAR))


def _judge(is_right: Callable[[Array], Array]) -> Judge:
    def judge(got: Array) -> tuple[float, float]:
        wrong = ~is_right(got)
        return float(wrong.sum()), np.inf if wrong.any() else 0.0

    return judge


def _are_elements(
    blocks: Array, factors: tuple[Array, Array], grid: Array, decode: Callable[[Array], Array]
) -> Judge:
    """Every element is the number of the grid nearest to its quotient."""

    def is_right(got: Array) -> Array:
        found = decode(got).reshape(blocks.shape)
        right = np.zeros(blocks.shape[:-1], bool)
        for factor in factors:
            wanted = np.clip(blocks * factor[..., None], grid[0], grid[-1])
            gaps = np.abs(grid - wanted[..., None]).min(axis=-1)
            near = np.abs(found - wanted) <= gaps + _NEAR * np.abs(wanted)
            right |= near.all(axis=-1)
        return right

    return _judge(is_right)


def _are_scales(
    scales: tuple[Array, Array], layout: int, padding: int, decode: Callable[[Array], Array]
) -> Judge:
    """Every byte is a scale's, in its place, and 0 in all others."""

    def place(each: Array) -> Array:
        whole = np.pad(each, ((0, 0), (0, padding)))
        return whole.reshape(-1) if layout == 2 else _in_tiles(whole[None], (128, 8)[layout])

    low, high = map(place, scales)
    is_scale = place(np.ones_like(scales[0])) > 0

    def is_right(got: Array) -> Array:
        value = decode(got)
        right: Array = np.where(is_scale, (value == low) | (value == high), got == 0)
        return right

    return _judge(is_right)


def _power_of(code: Array) -> Array:
    power: Array = 2.0 ** (code.astype(np.float64) - 127)
    return power


def mxfp8_quantize(a: Inputs) -> Exact:
    (n, k), padded_k = a["input"].shape, a["valMxFP8"].shape[1]
    blocks = a["input"].reshape(n, k // 32, 32)
    scales = _as_powers(np.abs(blocks).max(axis=-1) / 448)
    layout = a["sfSwizzleLayout"] if "sfSwizzleLayout" in a else 2 - 2 * a["isSfSwizzledLayout"]
    low, high = (1 / scale for scale in scales)
    elements = _are_elements(blocks, (low, high), _FINITE, lambda got: got[:, :k].astype(float))

    def judge(got: Array) -> tuple[float, float]:
        padding = got[:, k:].astype(float)
        return elements(got) if not padding.any() else (np.inf, np.inf)

    padding = (padded_k - k) // 32
    return {"valMxFP8": judge, "scaleFP8SF": _are_scales(scales, layout, padding, _power_of)}


def _halves(got: Array) -> Array:
    codes = got.astype(int)
    values: Array = _E2M1[np.stack([codes % 16, codes // 16], axis=-1)]
    return values


def _bytes_of_e4m3(got: Array) -> Array:
    decoded: Array = _E4M3[got.astype(int)]
    return decoded


def _quotients(largest: Array, scales: tuple[Array, Array], of_all: float) -> tuple[Array, Array]:
    """What elements are multiplied by: nothing, where all of a block are 0."""
    low, high = (
        np.where(largest == 0, 0.0, of_all / np.where(scale == 0, 1.0, scale)) for scale in scales
    )
    return low, high


def fp4_quantize(a: Inputs) -> Exact:
    (n, k), size = a["input"].shape, a["sfVecSize"]
    blocks = a["input"].reshape(n, k // size, size)
    largest = np.abs(blocks).max(axis=-1)
    decode: Callable[[Array], Array] = _power_of
    if a["sfUseUE8M0"]:
        of_all, scales = 1.0, _as_powers(largest / 6)
    else:
        of_all = float(a["globalScale"][0])
        of_all = 1 / of_all if a.get("isGlobalScaleInversed", False) else of_all
        scales, decode = _as_e4m3(of_all * largest / 6), _bytes_of_e4m3
    layout = int(a["isSf8x4Layout"]) if a["isSfSwizzledLayout"] else 2
    factors = _quotients(largest, scales, of_all)
    return {
        "valueE2M1": _are_elements(blocks, factors, np.unique(_E2M1), _halves),
        "scaleFP8SF": _are_scales(scales, layout, 0, decode),
    }


def nvfp4_kv_quant(a: Inputs) -> Exact:
    n, count = a["block_scales"].shape
    blocks, of_all = a["input"].reshape(n, count, 16), 1 / float(a["global_scale"][0])
    largest = np.abs(blocks).max(axis=-1)
    scales = _as_e4m3(of_all * largest / 6)
    low, high = scales

    def are_scales(got: Array) -> Array:
        value = _bytes_of_e4m3(got)
        right: Array = (value == low) | (value == high)
        return right

    elements = _are_elements(blocks, _quotients(largest, scales, of_all), np.unique(_E2M1), _halves)
    return {"fp4_output": elements, "block_scales": _judge(are_scales)}


EXACT: dict[str, Formula] = {
    "nvfp4_kv_dequant": nvfp4_kv_dequant,
    "mxfp8_quantize": mxfp8_quantize,
    "fp4_quantize": fp4_quantize,
    "nvfp4_kv_quant": nvfp4_kv_quant,
}
MOVES: dict[str, Move] = {
    "block_scale_interleave": block_scale_interleave,
    "block_scale_interleave_reverse": block_scale_interleave_reverse,
}
