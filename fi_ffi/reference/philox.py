"""Philox4x32-10 in the order of curand: the random words for a seed, a subsequence and an offset.

A subsequence is a sequence of 2^64 words of 32 bits; `offset` is the first word drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fi_ffi.reference.arrays import Array

Numbers = int | npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


def block(
    counter: tuple[Array, ...], key: tuple[Array, Array], rounds: int = _ROUNDS
) -> tuple[Array, ...]:
    """Return four words for each counter of four; all numbers are 64-bit."""
    x, y, z, w = counter
    first, second = key
    for _ in range(rounds):
        one, two = _MULTIPLIERS[0] * x, _MULTIPLIERS[1] * z
        x, y, z, w = (two >> _32) ^ y ^ first, two & _LOW, (one >> _32) ^ w ^ second, one & _LOW
        first, second = (first + _WEYL[0]) & _LOW, (second + _WEYL[1]) & _LOW
    return x, y, z, w


def words(seed: Numbers, subsequences: Array, offset: Numbers, count: int) -> Array:
    """Return [subsequences, count]: the words from `offset` on, of each subsequence.

    A seed and an offset have 64 bits; there may be one for each subsequence.
    """
    seeds, offsets, of = np.broadcast_arrays(_bits(seed), _bits(offset), _bits(subsequences))
    start, phase = offsets // np.uint64(4), offsets % np.uint64(4)
    blocks = start[:, None] + np.arange((count + 6) // 4, dtype=np.uint64)
    halves = [half for value in (blocks, of[:, None]) for half in (value & _LOW, value >> _32)]
    random_blocks = block(tuple(halves), (seeds[:, None] & _LOW, seeds[:, None] >> _32))
    stream = np.stack(random_blocks, axis=2).reshape(len(of), -1)
    at = phase[:, None].astype(np.int64) + np.arange(count)
    drawn: Array = np.take_along_axis(stream, at, axis=1).astype(np.uint32)
    return drawn


def uniforms(seed: Numbers, subsequences: Array, offset: Numbers, count: int) -> Array:
    """Return the words as float32 above 0 and up to 1, as `curand_uniform` makes them."""
    drawn = words(seed, subsequences, offset, count).astype(np.float32)
    numbers: Array = drawn * np.float32(2**-32) + np.float32(2**-33)
    return numbers


def _bits(value: Numbers | Array) -> Array:
    """Return each number as an unsigned 64-bit integer."""
    if isinstance(value, int):
        return np.array([value % 2**64], np.uint64)
    return np.ravel(value).astype(np.uint64)
