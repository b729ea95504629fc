"""4-bit weights in numpy: in the order of Hopper's kernels and back, and what they stand for."""

from __future__ import annotations

import functools

import numpy as np

from fi_ffi.reference.arrays import Array

_ROWS, _COLUMNS = 16, 64  # of values that change places among one another

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([E2M1, -E2M1])
_INT4 = np.array([*range(8), *range(-8, 0)], np.float32)


# What a place in a block is made of (for fp4 the upper half of the rows or the lower, the row in
# it, 16 columns' pairs of which 8, 4 and 1, and which of a pair), and their order after the move:
# two rows' values of a column share a byte.  Of int4 four values move at a time.
_MOVES = {
    "fp4": ((2, 8, 2, 2, 2, 4, 2), (3, 1, 2, 5, 4, 6, 0)),
    "int4": ((2, 8, 2, 2, 4, 4), (3, 1, 2, 4, 0, 5)),
}


@functools.cache
def order(quant_type: str) -> Array:
    """Where each value of a block comes from, as places in the flat block."""
    shape, axes = _MOVES[quant_type]
    places: Array = np.arange(_ROWS * _COLUMNS).reshape(shape).transpose(axes).ravel()
    return places


def codes(packed: Array) -> Array:
    """The 4-bit codes of bytes, the lower half first."""
    both: Array = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)


def pack(values: Array) -> Array:
    """The bytes of 4-bit codes."""
    both: Array = values[..., 0::2] | values[..., 1::2] << 4
    return both


def _reordered(weight: Array, places: Array) -> Array:
    """Bytes of weights with the values of each block taken from other places of it."""
    values = codes(weight)
    experts, rows, columns = values.shape
    blocks = values.reshape(experts, rows // _ROWS, _ROWS, columns // _COLUMNS, _COLUMNS)
    flat = blocks.transpose(0, 1, 3, 2, 4).reshape(-1, _ROWS * _COLUMNS)[:, places]
    back = flat.reshape(experts, rows // _ROWS, columns // _COLUMNS, _ROWS, _COLUMNS)
    return pack(back.transpose(0, 1, 3, 2, 4).reshape(values.shape))


def interleave(weight: Array, quant_type: str) -> Array:
    return _reordered(weight, order(quant_type))


def deinterleave(weight: Array, quant_type: str) -> Array:
    return _reordered(weight, np.argsort(order(quant_type)))


def interleave_scales(scales: Array, factor: int) -> Array:
    """[experts, rows, groups] to [experts, groups / factor, rows * factor]."""
    experts, rows, groups = scales.shape
    parts = scales.reshape(experts, rows, groups // factor, factor).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts).reshape(experts, groups // factor, rows * factor)


def deinterleave_scales(scales: Array, rows: int) -> Array:
    """The inverse of `interleave_scales`."""
    experts, blocks, columns = scales.shape
    parts = scales.reshape(experts, blocks, rows, columns // rows).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts).reshape(experts, rows, -1)


def e8m0(scales: Array) -> Array:
    """Powers of two, by their exponents' bytes."""
    return np.where(scales == 0xFF, np.nan, np.ldexp(np.float32(1), scales.astype(np.int32) - 127))


def fp4(packed: Array) -> Array:
    """The numbers of 4 bits in bytes."""
    values: Array = _FP4[codes(packed)]
    return values


def mxfp4(weight: Array, scales: Array) -> Array:
    """One expert's matrix, of bytes and E8M0 scales in the natural order."""
    values: Array = fp4(weight) * np.repeat(e8m0(scales), 32, axis=-1)
    return values


def int4(weight: Array, scales: Array) -> Array:
    """One expert's matrix, of bytes and scales in the natural order."""
    values: Array = _INT4[codes(weight)] * np.repeat(scales.astype(np.float32), 128, axis=-1)
    return values
