"""Blackwell's mixtures of experts: values in blocks with a scale each, quantised and dequantised.

Scales are bytes in tiles of 128 rows and 4 columns. NVFP4 has a float8_e4m3fn scale for 16
elements; MXFP4 and MXFP8 have a power of 2 for 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from fi_ffi.reference import moe_weights
from fi_ffi.reference.arrays import Array, wide

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Format:
    """Blocks of `size` elements; `is_fp4` describes the elements, `is_e4m3` the scales."""

    size: int
    is_fp4: bool
    is_e4m3: bool

    def scales(self, codes: Array) -> Array:
        """Decode the bytes of scales."""
        values = codes.view(_E4M3) if self.is_e4m3 else moe_weights.e8m0(codes)
        return wide(values)

    def elements(self, packed: Array) -> Array:
        """Decode the elements of rows of bytes."""
        values = moe_weights.fp4(packed) if self.is_fp4 else packed.view(_E4M3)
        return wide(values)

    def matrix(self, packed: Array, scales: Array) -> Array:
        """Decode rows of elements, and multiply them by their scales, which are in rows as well."""
        value = self.elements(packed)
        scale = self.scales(scales).repeat(self.size, axis=-1)
        product: Array = value * scale[: len(value), : value.shape[-1]]
        return product

    def quantised(self, value: Array, of_all: float = 1.0) -> Array:
        """Quantise rows and dequantise them; the result includes the factor `of_all`, the tensor-
        wide scale."""
        blocks = value.reshape(*value.shape[:-1], -1, self.size)
        wanted = np.abs(blocks).max(axis=-1, keepdims=True) / (6.0 if self.is_fp4 else 448.0)
        if self.is_e4m3:
            scale = wide(np.clip(wanted * of_all, 0, 448).astype(_E4M3))
        else:  # the least power of 2 that is not smaller
            mantissa, exponent = np.frexp(np.maximum(wanted, 2.0**-127))
            scale = 2.0 ** np.where(mantissa == 0.5, exponent - 1, exponent)
        scaled = blocks * (of_all / np.where(scale > 0, scale, np.inf))
        most, dtype = (6.0, ml_dtypes.float4_e2m1fn) if self.is_fp4 else (448.0, _E4M3)
        rounded = wide(np.clip(scaled, -most, most).astype(dtype))
        result: Array = (rounded * scale).reshape(value.shape)
        return result


NVFP4, MXFP4, MXFP8 = Format(16, True, True), Format(32, True, False), Format(32, False, False)


def in_rows(tiles: Array, columns: int) -> Array:
    """Return the scales of one matrix in rows of `columns`, a multiple of 4, from tiles."""
    split = tiles.reshape(-1, columns // 4, 32, 4, 4)
    rows: Array = split.transpose(0, 3, 2, 1, 4).reshape(-1, columns)
    return rows


def matrices(weight: Array, scales: Array, of: Format) -> Callable[[int], Array]:
    """Return a function of an expert that decodes its matrix, from weights and int32 scales as the
    kernels have them."""
    columns = 4 * scales.shape[-1]

    def matrix(expert: int) -> Array:
        rows = in_rows(scales[expert].view(np.uint8).reshape(-1), columns)
        return of.matrix(weight[expert].view(np.uint8), rows)

    return matrix


def activations(x: Array, scales: Array, is_swizzled: bool, of: Format) -> Array:
    """Decode quantised activations."""
    values = of.elements(x.view(np.uint8))
    columns = -(-values.shape[1] // (4 * of.size)) * 4
    count = (-(-len(x) // 128) * 128 if is_swizzled else len(x)) * columns
    flat = scales.reshape(-1)[:count].view(np.uint8)
    rows = in_rows(flat, columns) if is_swizzled else flat.reshape(-1, columns)
    scale = of.scales(np.ascontiguousarray(rows[: len(x)])).repeat(of.size, axis=-1)
    result: Array = values * scale[:, : values.shape[1]]
    return result
