"""Quantising blocks with a scale each in numpy, rounding where the kernels round.

Which of two neighbouring numbers an element becomes is decided by the order of float32 products and
reciprocals before it: the formulas of exact_block_scaled.py judge, and allow both.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, store

# Rows that a tile of scales has, by the code of their layout; in rows where there is none.
_TILES = {0: 128, 1: 8}
_ROWS = 2


def places(rows: int, cols: int, tile: int) -> Array:
    """Where each scale of a matrix is, in tiles of `tile` rows and 4 columns."""
    row, col = np.arange(rows)[:, None], np.arange(cols)
    in_tile = row % 32 * 16 + row % tile // 32 * 4 if tile == 128 else row % tile * 4
    tiles = row // tile * -(-cols // 4) + col // 4
    found: Array = tiles * (4 * tile) + in_tile + col % 4
    return found


def mxfp8_quantize(
    input: Array, values: Array, scales: Array, layout: int | bool, alignment: int, pdl: bool
) -> None:
    (n, k), padded_k = input.shape, values.shape[1]
    if isinstance(layout, bool):  # up to FlashInfer 0.6.6
        layout = 0 if layout else _ROWS
    blocks = input.astype(np.float32).reshape(n, k // 32, 32)
    exponent = _exponents(np.abs(blocks).max(axis=-1) * np.float32(1 / 448))
    values[...] = 0
    scaled = np.ldexp(blocks, -exponent[..., None]).reshape(n, k)
    store(values[:, :k], np.clip(scaled, -448, 448))
    found = np.zeros((n, padded_k // 32), np.uint8)
    found[:, : k // 32] = exponent + 127
    _store_scales(scales, found, layout)


def _exponents(scale: Array) -> Array:
    """Of the powers of 2 that scales are rounded up to."""
    mantissa, exponent = np.frexp(scale)
    exponent = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), -127, 127)
    found: Array = np.where(mantissa == 0, -127, exponent)
    return found


def _store_scales(scales: Array, found: Array, layout: int) -> None:
    scales[...] = 0
    if layout == _ROWS:
        scales[...] = found.reshape(-1)
    else:
        rows, cols = found.shape
        scales[places(rows, cols, _TILES[layout])] = found


def _store_e2m1(out: Array, blocks: Array) -> None:
    """Rounded to even, and two to a byte."""
    rounded = np.clip(blocks, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = rounded.reshape(len(out), -1, 2) if out.size else rounded.reshape(*out.shape, 2)
    out[...] = codes[..., 0] | codes[..., 1] << 4


def _e4m3(scale: Array) -> tuple[Array, Array]:
    """Scales rounded: their bytes, and what these are."""
    rounded = np.clip(scale, 0, 448).astype(ml_dtypes.float8_e4m3fn)
    return rounded.view(np.uint8), rounded.astype(np.float32)


def _over(blocks: Array, largest: Array, factor: Array) -> Array:
    scaled: Array = blocks * np.where(largest == 0, np.float32(0), factor)[..., None]
    return scaled


def fp4_quantize(
    input: Array, global_scale: Array | None, values: Array, scales: Array, size: int,
    is_power: bool, is_swizzled: bool, is_8x4: bool, *last: object,
) -> None:  # fmt: skip
    # `isGlobalScaleInversed` came with FlashInfer 0.6.11, before `enable_pdl`.
    is_inverse = len(last) > 1 and bool(last[0])
    blocks = input.astype(np.float32).reshape(len(input), -1, size) if input.size else None
    if blocks is None:
        return
    largest = np.abs(blocks).max(axis=-1)
    if is_power:
        exponent = _exponents(largest * np.float32(1 / 6))
        codes, factor = (exponent + 127).astype(np.uint8), np.ldexp(np.float32(1), -exponent)
    else:
        assert global_scale is not None
        given = global_scale[0]
        of_all = 1 / given if is_inverse else given
        codes, scale = _e4m3(of_all * (largest * np.float32(1 / 6)))
        factor = 1 / (scale * (1 / of_all))
    _store_e2m1(values, _over(blocks, largest, factor))
    _store_scales(scales, codes, int(is_8x4) if is_swizzled else _ROWS)


def nvfp4_kv_quant(input: Array, global_scale: Array, output: Array, scales: Array) -> None:
    blocks = input.astype(np.float32).reshape(*scales.shape, 16)
    largest = np.abs(blocks).max(axis=-1)
    codes, scale = _e4m3(1 / global_scale[0] * (largest * np.float32(1 / 6)))
    _store_e2m1(output, _over(blocks, largest, 1 / (scale * global_scale[0])))
    scales[...] = codes


KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "mxfp8_quantization_sm100": {"mxfp8_quantize": mxfp8_quantize},
    "fp4_quantization_100": {"fp4_quantize": fp4_quantize},
    "fp4_kv_quant": {"nvfp4_kv_quant": nvfp4_kv_quant},
}
