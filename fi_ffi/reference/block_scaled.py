"""Blocks with a scale each in float64, from their formats' definitions.

The kernels compute scales and quotients in float32, with reciprocals that are not correctly
rounded. If such a quotient lies between two neighbouring numbers, either is accepted. Being
compiled for fast arithmetic, they take subnormal numbers for 0, as inputs and as results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, bits, every_value, wide
from fi_ffi.reference.attention.formula import tokens_first
from fi_ffi.reference.formula import Exact, Formula, Inputs, Move, OneOfMany
from fi_ffi.reference.moe_weights import FP4, fp4

Whole: TypeAlias = "Callable[[], Array]"

_NEAR = 2.0**-18
_LEAST = 2.0**-126  # the least normal float32
_NAN, _MOST = 255.0, 254.0  # bytes of e8m0: no number, and the greatest
_E4M3 = every_value(np.dtype(ml_dtypes.float8_e4m3fn))
_FINITE = np.array(sorted({*_E4M3[np.isfinite(_E4M3)].tolist()}), _E4M3.dtype)
# Codes of the order of scales: rows of a tile by code, and the code for plain rows.
_TILES, _ROWS = {0: 128, 1: 8}, 2

# ---------------------------------------------------------------- moving and dequantising


def nvfp4_kv_dequant(a: Inputs) -> Exact:
    values = fp4(a["fp4_data"].astype(int)).reshape(a["output"].shape)
    scales = a["block_scales"]
    if "block_scales" not in a["largest"]:  # bytes
        scales = _E4M3[scales.astype(int)]
    value = values * scales.repeat(16, axis=1) * a["global_scale"]
    return {"output": (value, np.abs(value))}


def _in_tiles(scales: Array, tile: int) -> Array:
    """Put the scales of matrices into tiles, padded with 0."""
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


# ---------------------------------------------------------------- quantising


class _Scales:
    """The accepted scales of each block, as bytes; the first is the nearest."""

    def __init__(self, wanted: Array, rounded: Callable[[Array], Array]) -> None:
        self.codes = [rounded(wanted * (1 + by)) for by in (0.0, -_NEAR, _NEAR)]

    def are(self, place: Callable[[Array], Array]) -> OneOfMany:
        """Return the expected bytes: an accepted scale in each scale's place, and 0 in all
        others."""
        placed = np.stack([place(codes) for codes in self.codes])

        def are_right(got: Array) -> Array:
            right: Array = (got == placed).any(axis=0)
            return right

        return OneOfMany(lambda: placed[0], _judge(are_right))


def _judge(is_right: Callable[[Array], Array]) -> Callable[[Array], tuple[float, float]]:
    def judge(got: Array) -> tuple[float, float]:
        wrong = ~is_right(got)
        return float(wrong.sum()), np.inf if wrong.any() else 0.0

    return judge


def _in_blocks(x: Array, size: int) -> tuple[Array, Array]:
    """Return the rows in blocks, without subnormal numbers, and the largest magnitude of each
    block; NaN only if it has nothing else."""
    shape = (*x.shape[:-1], x.shape[-1] // size, size)
    blocks = np.where(np.abs(x) < _LEAST, np.copysign(0.0, x), x).reshape(shape)
    return blocks, np.fmax.reduce(np.abs(blocks), axis=-1)


def _bytes_of_e4m3(x: Array) -> Array:
    rounded = np.abs(np.clip(x, 0, 448)).astype(ml_dtypes.float8_e4m3fn)
    return bits(rounded).astype(np.float64)


def _bytes_of_e8m0(x: Array) -> Array:
    """Return the exponents, biased by 127, of the least powers of 2 that are not smaller."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
    codes = np.where(mantissa == 0.5, exponent - 1, exponent) + 127.0
    codes = np.where(x < _LEAST, 0.0, np.where(np.isinf(x), _MOST, codes))
    return np.where(np.isnan(x), _NAN, codes)


def _of_e4m3(codes: Array) -> Array:
    value: Array = _E4M3[codes.astype(int)]
    return value


def _of_e8m0(codes: Array) -> Array:
    """Return the divisors. Of the least and the greatest scale the kernels have a subnormal number,
    or a subnormal reciprocal: they multiply by 0."""
    value = np.where((codes == 0) | (codes == _MOST), np.inf, 2.0 ** (codes - 127))
    return np.where(codes == _NAN, np.nan, value)


def _reciprocal(x: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.reciprocal(x))


def _quotients(
    blocks: Array, scales: _Scales, decode: Callable[[Array], Array], of_all: float | Array = 1.0
) -> list[Array]:
    """Divide elements by each accepted scale of their block; 0 for a block of zeros."""
    # By a scale that was rounded to 0, quotients saturate, and those of 0 are NaN.
    has_some = (blocks != 0).any(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = (np.where(has_some, of_all / decode(codes), 0) for codes in scales.codes)
        return [blocks * factor[..., None] for factor in factors]


def _are_nearest(wanted: list[Array], values: Array, grid: Array) -> Array:
    """Whether all elements of a block are grid numbers nearest to the quotients of one scale."""
    right = np.zeros(values.shape[:-1], bool)
    for quotients in wanted:
        limited = np.clip(quotients, grid[0], grid[-1])
        above = np.clip(np.searchsorted(grid, limited), 1, len(grid) - 1)
        gaps = np.minimum(np.abs(grid[above] - limited), np.abs(grid[above - 1] - limited))
        near = np.abs(values - limited) <= gaps + _NEAR * np.abs(limited)
        right |= (near | np.isnan(limited) & np.isnan(values)).all(axis=-1)
    return right


def scales_in_layout(layout: int, padding: int = 0) -> Callable[[Array], Array]:
    """Return a function that puts scales in a layout, with `padding` more columns of 0."""

    def place(codes: Array) -> Array:
        whole = np.pad(codes, ((0, 0), (0, padding)))
        return whole.reshape(-1) if layout == _ROWS else _in_tiles(whole[None], _TILES[layout])

    return place


def mxfp8_quantize(a: Inputs) -> Exact:
    (n, k), padded_k = a["input"].shape, a["valMxFP8"].shape[1]
    blocks, largest = _in_blocks(a["input"], 32)
    scales = _Scales(largest / 448, _bytes_of_e8m0)
    wanted = _quotients(blocks, scales, _of_e8m0)
    # Releases without a layout code have a flag for two of the layouts.
    layout = a["sfSwizzleLayout"] if "sfSwizzleLayout" in a else 2 - 2 * a["isSfSwizzledLayout"]

    def value() -> Array:
        elements = np.clip(wanted[0], -448, 448).reshape(n, k)
        elements[np.isnan(elements)] = np.nan  # without a sign
        return np.pad(elements, ((0, 0), (0, padded_k - k)))

    def are_right(got: Array) -> Array:
        found = wide(got)
        nearest = _are_nearest(wanted, found[:, :k].reshape(blocks.shape), _FINITE)
        return np.hstack([nearest, found[:, k:] == 0])

    return {
        "valMxFP8": OneOfMany(value, _judge(are_right)),
        "scaleFP8SF": scales.are(scales_in_layout(layout, (padded_k - k) // 32)),
    }


def _in_halves(
    wanted: list[Array], shape: tuple[int, ...]
) -> tuple[Whole, Callable[[Array], Array]]:
    """Return elements of 4 bits, two to a byte, and whether bytes are right, by block. NaN becomes
    the greatest number."""
    wanted = [np.where(np.isnan(each), np.inf, each) for each in wanted]

    def value() -> Array:
        rounded = np.clip(wanted[0], -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        low, high = rounded.reshape(*shape, 2).transpose(-1, *range(len(shape)))
        packed: Array = low + 16.0 * high
        return packed

    def are_right(got: Array) -> Array:
        found = fp4(got.astype(int)).reshape(wanted[0].shape)
        return _are_nearest(wanted, found, np.unique(FP4))

    return value, are_right


def _are_halves(wanted: list[Array], shape: tuple[int, ...]) -> OneOfMany:
    value, are_right = _in_halves(wanted, shape)
    return OneOfMany(value, _judge(are_right))


def fp4_quantize(a: Inputs) -> Exact:
    size = a["sfVecSize"]
    blocks, largest = _in_blocks(a["input"], size)
    if a["sfUseUE8M0"]:
        scales = _Scales(largest / 6, _bytes_of_e8m0)
        wanted = _quotients(blocks, scales, _of_e8m0)
    else:
        of_all = a["globalScale"].ravel()[0]
        of_all = _reciprocal(of_all) if a.get("isGlobalScaleInversed", False) else of_all
        scales = _Scales(of_all * largest / 6, _bytes_of_e4m3)
        wanted = _quotients(blocks, scales, _of_e4m3, of_all)
    layout = int(a["isSf8x4Layout"]) if a["isSfSwizzledLayout"] else _ROWS
    return {
        "valueE2M1": _are_halves(wanted, a["valueE2M1"].shape),
        "scaleFP8SF": scales.are(scales_in_layout(layout)),
    }


def fp4_batched_quantize(a: Inputs) -> Exact:
    b = len(a["input"])
    blocks, largest = _in_blocks(a["input"], 16)
    of_all = a["globalScale"][:, None]
    scales = _Scales(of_all * largest / 6, _bytes_of_e4m3)
    wanted = _quotients(blocks, scales, _of_e4m3, of_all)
    return {
        "valueE2M1": _are_halves(wanted, a["valueE2M1"].shape),
        "scaleFP8SF": scales.are(lambda codes: _in_tiles(codes, 128).reshape(b, -1)),
    }


def nvfp4_kv_quant(a: Inputs) -> Exact:
    blocks, largest = _in_blocks(a["input"], 16)
    of_all = _reciprocal(a["global_scale"].ravel()[0])
    scales = _Scales(of_all * largest / 6, _bytes_of_e4m3)
    wanted = _quotients(blocks, scales, _of_e4m3, of_all)
    return {
        "fp4_output": _are_halves(wanted, a["fp4_output"].shape),
        "block_scales": scales.are(lambda codes: codes),
    }


# ---------------------------------------------------------------- appending to a cache of 4 bits


def _written(
    before: Array, layout: int, where: Any, value: Whole, are_right: Callable[[Array], Array]
) -> OneOfMany:
    """Return the expected cache: tokens at `where`, and everything else as before."""

    def after() -> Array:
        cache: Array = before.copy()
        tokens_first(cache, layout)[where] = value()
        return cache

    def right(got: Array) -> Array:
        found = wide(got)
        same: Array = (found == before) | np.isnan(found) & np.isnan(before)
        tokens_first(same, layout)[where] = are_right(tokens_first(got, layout)[where])
        return same

    return OneOfMany(after, _judge(right))


def nvfp4_quantize_append_paged_kv_cache_with_slot_mapping(a: Inputs) -> Exact:
    layout, found = a["kv_layout"], {}
    pages, size = tokens_first(a["paged_k_cache"], layout).shape[:2]
    slots = a["slot_mapping"].astype(np.int64)
    rows = np.flatnonzero((slots >= 0) & (slots < pages * size))
    where = slots[rows] // size, slots[rows] % size
    for x, new in (("k", a["append_key"]), ("v", a["append_value"])):
        of_all = float(np.ravel(a[f"{x}_scale"])[0])
        blocks, largest = _in_blocks(new[rows], 16)
        scales = _Scales(largest / (6 * of_all), _bytes_of_e4m3)
        decoded = [_of_e4m3(codes) for codes in scales.codes]
        # Elements of a block whose scale is rounded to 0 are 0.
        with np.errstate(divide="ignore"):
            factors = [np.where(each > 0, 1 / (each * of_all), 0) for each in decoded]
        value, are_right = _in_halves(
            [blocks * factor[..., None] for factor in factors],
            (*blocks.shape[:2], blocks.shape[2] * 8),
        )

        def are_halves(got: Array, are_right: Callable[[Array], Array] = are_right) -> Array:
            each: Array = are_right(got).repeat(8, axis=-1)
            return each

        def are_scales(got: Array, codes: list[Array] = scales.codes) -> Array:
            near: Array = (bits(np.ascontiguousarray(got)) == np.stack(codes)).any(axis=0)
            return near

        cache, of_blocks = f"paged_{x}_cache", f"{x}_scale_cache"
        found[cache] = _written(a[cache], layout, where, value, are_halves)
        found[of_blocks] = _written(
            a[of_blocks], layout, where, partial(_of_e4m3, scales.codes[0]), are_scales
        )
    return found


EXACT: dict[str, Formula] = {
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": (
        nvfp4_quantize_append_paged_kv_cache_with_slot_mapping
    ),
    "nvfp4_kv_dequant": nvfp4_kv_dequant,
    "mxfp8_quantize": mxfp8_quantize,
    "fp4_quantize": fp4_quantize,
    "fp4_batched_quantize": fp4_batched_quantize,
    "nvfp4_kv_quant": nvfp4_kv_quant,
}
MOVES: dict[str, Move] = {
    "block_scale_interleave": block_scale_interleave,
    "block_scale_interleave_reverse": block_scale_interleave_reverse,
}
