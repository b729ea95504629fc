"""Packed masks and ALiBi's slopes, against their definitions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import fi_ffi


def masks_of(rng, lens):
    return [rng.random(shape) < 0.5 for shape in lens]


LENS = [(3, 7), (0, 5), (1, 8), (5, 0), (2, 9), (0, 0), (16, 64), (1, 1)]


def bit(packed: np.ndarray, at: int) -> bool:
    return bool(int(packed[at // 8]) >> (at % 8) & 1)


def test_each_bit_of_a_batch(rng):
    masks = masks_of(rng, LENS)
    packed = fi_ffi.pack_custom_mask(masks)
    assert packed.dtype == np.uint8 and packed.ndim == 1 and packed.flags.c_contiguous
    start = 0
    for mask in masks:
        qo_len, kv_len = mask.shape
        stop = start + -(-qo_len * kv_len // 8)
        own = packed[start:stop]
        for i in range(qo_len):
            for j in range(kv_len):
                assert bit(own, i * kv_len + j) == mask[i, j]
        assert not any(bit(own, at) for at in range(qo_len * kv_len, 8 * len(own)))
        start = stop
    assert start == len(packed)


@pytest.mark.parametrize("arrange", [tuple, list, np.stack])
def test_sequences(arrange, rng):
    masks = masks_of(rng, [(3, 5)] * 4)
    expected = b"".join(fi_ffi.pack_custom_mask(mask).tobytes() for mask in masks)
    assert fi_ffi.pack_custom_mask(arrange(masks)).tobytes() == expected


def test_masks_with_strides(rng):
    wide = rng.random((8, 12)) < 0.5
    for mask in (wide[::2, ::3], wide.T, wide[::-1]):
        assert (fi_ffi.pack_custom_mask(mask) == fi_ffi.pack_custom_mask(mask.copy())).all()


class Exported:
    """An array of another library, which numpy reads."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.array


class OnGpu:
    """One that numpy cannot read."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_arrays_of_others(rng):
    mask = rng.random((3, 5)) < 0.5
    for given in (Exported(mask), [Exported(mask)]):
        assert (fi_ffi.pack_custom_mask(given) == fi_ffi.pack_custom_mask(mask)).all()


RIGHT = np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("value", "type_", "words"),
    [
        (RIGHT[0], fi_ffi.ArgumentError, r"got bool of shape \(3,\), expected shape \[qo_len"),
        (RIGHT[None, None], fi_ffi.ArgumentError, r"shape \(1, 1, 2, 3\)"),
        ([RIGHT, RIGHT[0]], fi_ffi.ArgumentError, r"shape \(3,\) for request 1"),
        ([RIGHT[None]], fi_ffi.ArgumentError, r"shape \(1, 2, 3\) for request 0"),
        ([], fi_ffi.ArgumentError, "got no masks"),
        (np.ones((0, 2, 3), bool), fi_ffi.ArgumentError, "got no masks"),
        (RIGHT.astype(np.uint8), fi_ffi.ArgumentTypeError, "got ndarray of uint8"),
        (RIGHT.astype(np.float32), fi_ffi.ArgumentTypeError, "got ndarray of float32"),
        ([RIGHT, RIGHT.astype(int)], fi_ffi.ArgumentTypeError, "got ndarray of int64"),
        ([[True, False], [True, True]], fi_ffi.ArgumentTypeError, "got list for request 0"),
        (None, fi_ffi.ArgumentTypeError, "got NoneType of object"),
        ("mask", fi_ffi.ArgumentTypeError, "got str of"),
        (7, fi_ffi.ArgumentTypeError, "got int of int64"),
        ([RIGHT, None], fi_ffi.ArgumentTypeError, "got NoneType of object"),
        (OnGpu(), fi_ffi.ArgumentTypeError, "OnGpu that refused: can't convert"),
        ([RIGHT, OnGpu()], fi_ffi.ArgumentTypeError, "OnGpu that refused: can't convert"),
    ],
)
def test_masks_that_are_none(value, type_, words):
    with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
        fi_ffi.pack_custom_mask(value)
    assert type(caught.value) is type_
    assert (caught.value.op, caught.value.argument) == ("pack_custom_mask", "masks")


def exponents(num_heads: int) -> list[Fraction]:
    """ALiBi's slopes as powers of 2, by the recursion of the authors' own code."""
    closest = 1
    while 2 * closest <= num_heads:
        closest *= 2
    if closest == num_heads:
        ratio = Fraction(-8, num_heads)
        return [ratio * (i + 1) for i in range(num_heads)]
    return exponents(closest) + exponents(2 * closest)[0::2][: num_heads - closest]


@pytest.mark.parametrize("heads", [*range(1, 41), 48, 64, 71, 96, 112, 128])
def test_slopes(heads):
    slopes = fi_ffi.alibi_slopes(heads)
    assert slopes.dtype == np.float32 and slopes.shape == (heads,)
    expected = [2.0 ** float(power) for power in exponents(heads)]
    np.testing.assert_allclose(slopes, expected, rtol=2.0**-23, atol=0)


def test_known_slopes():
    assert fi_ffi.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert fi_ffi.alibi_slopes(1).tolist() == [2.0**-8]
    assert fi_ffi.alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    assert fi_ffi.alibi_slopes(np.int64(2)).tolist() == [2.0**-4, 2.0**-8]


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "8", 2**31])
def test_numbers_of_heads(value):
    with pytest.raises(fi_ffi.ArgumentError, match="expected .*int") as caught:
        fi_ffi.alibi_slopes(value)
    assert (caught.value.op, caught.value.argument) == ("alibi_slopes", "num_heads")


def test_a_mask_of_all_requests_side_by_side_is_told(rng):
    """FlashInfer takes one flat mask, and the plan's lengths to split it."""
    flat = np.concatenate([mask.ravel() for mask in masks_of(rng, LENS)])
    with pytest.raises(fi_ffi.ArgumentError, match=r"\[qo_len, kv_len\] of each request, which"):
        fi_ffi.pack_custom_mask(flat)
