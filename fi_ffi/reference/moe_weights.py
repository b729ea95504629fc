"""Values of 4 bits in numpy, and weights of them in the order of Hopper's kernels and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from fi_ffi.reference.arrays import Array

_ROWS, _COLUMNS = 16, 64  # of a block, within which values are permuted

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4 = np.concatenate([E2M1, -E2M1])
_INT4 = np.array([*range(8), *range(-8, 0)], np.float32)


# By kind: the axes into which a block's positions are split, and their order after the permutation.
# The axes of fp4 are the half of the rows, the row in the half, the columns in four axes, and the
# element of a pair; afterwards values of two rows share a byte. int4 moves four values at a time.
# With folded scales, a word of fp4 has two bytes of each of two rows, and its bits are then spread.
_MOVES = {
    "fp4": ((2, 8, 2, 2, 2, 4, 2), (3, 1, 2, 5, 4, 6, 0)),
    "folded fp4": ((2, 8, 2, 2, 2, 4, 2), (3, 1, 2, 5, 4, 0, 6)),
    "int4": ((2, 8, 2, 2, 4, 4), (3, 1, 2, 4, 0, 5)),
}
# For each value of a word, the new places of its bits, the lowest first and the sign last.
_PLACES = (
    *(6, 7, 8, 15), *(22, 23, 24, 31), *(3, 4, 5, 12), *(19, 20, 21, 28),
    *(0, 1, 2, 9), *(16, 17, 18, 25), *(13, 10, 11, 14), *(29, 26, 27, 30),
)  # fmt: skip


@functools.cache
def order(quant_type: str) -> Array:
    """Return the source of each value of a block, as indices into the flat block."""
    shape, axes = _MOVES[quant_type]
    places: Array = np.arange(_ROWS * _COLUMNS).reshape(shape).transpose(axes).ravel()
    return places


def codes(packed: Array) -> Array:
    """Return the 4-bit codes of bytes, the lower half first."""
    both: Array = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(values: Array) -> Array:
    """Pack 4-bit codes into bytes."""
    both: Array = values[..., 0::2] | values[..., 1::2] << 4
    return both


def _reordered(weight: Array, places: Array) -> Array:
    """Permute the values of each block of packed weights by `places`."""
    values = codes(weight)
    experts, rows, columns = values.shape
    blocks = values.reshape(experts, rows // _ROWS, _ROWS, columns // _COLUMNS, _COLUMNS)
    flat = blocks.transpose(0, 1, 3, 2, 4).reshape(-1, _ROWS * _COLUMNS)[:, places]
    back = flat.reshape(experts, rows // _ROWS, columns // _COLUMNS, _ROWS, _COLUMNS)
    return pack(back.transpose(0, 1, 3, 2, 4).reshape(values.shape))


def _moved(packed: Array, places: Iterable[tuple[int, int]]) -> Array:
    """Move the bits of each word to other places."""
    words = packed.view("<u4")
    moved = np.zeros_like(words)
    for source, target in places:
        moved |= (words >> source & 1) << target
    return moved.view(np.uint8)


def interleave(weight: Array, quant_type: str, is_folded: bool = False) -> Array:
    if is_folded and quant_type == "fp4":
        return _moved(_reordered(weight, order("folded fp4")), enumerate(_PLACES))
    return _reordered(weight, order(quant_type))


def deinterleave(weight: Array, quant_type: str, is_folded: bool = False) -> Array:
    if is_folded and quant_type == "fp4":
        quant_type = "folded fp4"
        weight = _moved(weight, ((place, i) for i, place in enumerate(_PLACES)))
    return _reordered(weight, np.argsort(order(quant_type)))


def interleave_scales(scales: Array, factor: int) -> Array:
    """Change [experts, rows, groups] to [experts, groups / factor, rows * factor]."""
    experts, rows, groups = scales.shape
    parts = scales.reshape(experts, rows, groups // factor, factor).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts).reshape(experts, groups // factor, rows * factor)


def deinterleave_scales(scales: Array, rows: int) -> Array:
    """Invert `interleave_scales`."""
    experts, blocks, columns = scales.shape
    parts = scales.reshape(experts, blocks, rows, columns // rows).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts).reshape(experts, rows, -1)


def fold_scales(scales: Array, together: int) -> Array:
    """Change [experts, rows, groups] to [experts, rows / 64, groups / together, lines, line].

    A line has 16 bytes: `together` groups of each of its rows. The distance between its rows is the
    number of lines.
    """
    experts, rows, groups = scales.shape
    line = 16 // scales.itemsize
    slices = line // together
    parts = scales.reshape(experts, rows // 64, slices, 64 // slices, groups // together, together)
    folded = parts.transpose(0, 1, 4, 3, 2, 5)
    return np.ascontiguousarray(folded).reshape(*folded.shape[:4], line)


def unfold_scales(scales: Array) -> Array:
    """Invert `fold_scales`."""
    experts, blocks, steps, lines, line = scales.shape
    slices = 64 // lines
    parts = scales.reshape(experts, blocks, steps, lines, slices, line // slices)
    return np.ascontiguousarray(parts.transpose(0, 1, 4, 3, 2, 5)).reshape(
        experts, blocks * 64, steps * (line // slices)
    )


def e8m0(scales: Array) -> Array:
    """Decode powers of two from their exponents' bytes."""
    return np.where(scales == 0xFF, np.nan, np.ldexp(np.float32(1), scales.astype(np.int32) - 127))


def fp4(packed: Array) -> Array:
    """Decode the 4-bit floats in bytes."""
    values: Array = FP4[codes(packed)]
    return values


def mxfp4(weight: Array, scales: Array) -> Array:
    """Decode one expert's matrix, from bytes and E8M0 scales in natural order."""
    values: Array = fp4(weight) * np.repeat(e8m0(scales), 32, axis=-1)
    return values


def int4(weight: Array, scales: Array) -> Array:
    """Decode one expert's matrix, from bytes and scales in natural order."""
    values: Array = _INT4[codes(weight)] * np.repeat(scales.astype(np.float32), 128, axis=-1)
    return values
