"""Philox against the answers that its authors publish, and against curand's own code."""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi.reference.philox import block, uniforms, words

# Counter, key and words of Random123's philox4x32-10.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
# What curand_init(seed, subsequence, offset) and then curand() give, compiled for the host.
CURAND = [
    (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8 f8e4cca4 5cb200db b1a574eb"),
    (1, 2, 3, "0a0afddd b7b4c173 db04b052 44541f91 0e0b3cf3 93ef3e55 5a8567b3"),
    (0xDEADBEEFCAFEBABE, 5, 7,
     "7bafbf7d 5ddc8228 abc016b4 47df93d9 fea66d48 93d38e91 92884e69"),
    (42, 2**33, 2**34 + 2, "e088c940 404cbf42 072e4e7f 7ae0c89d 38a55fe0 55919560 0102f3b6"),
    (7, 0, 2**34 - 2, "0bd28410 60baeeec 2ec4f55d 249ef5f4 f681ec7f 807a6601 3cbe7593"),
]  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    counter, key = (np.array([numbers(text)], np.uint64).T for text in (counter, key))
    assert [int(word[0]) for word in block(tuple(counter), tuple(key))] == numbers(expected)


@pytest.mark.parametrize(("seed", "subsequence", "offset", "expected"), CURAND)
def test_words_are_curands(seed, subsequence, offset, expected):
    got = words(seed, np.array([subsequence], np.uint64), offset, 7)
    assert got.tolist() == [numbers(expected)]
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert (words(signed, np.array([subsequence], np.uint64), offset, 7) == got).all()


def test_offsets_skip_words():
    rows = np.arange(5, dtype=np.uint64)
    whole = words(3, rows, 0, 40)
    for offset in range(30):
        for count in (1, 2, 3, 4, 5, 10):
            got = words(3, rows, offset, count)
            assert (got == whole[:, offset : offset + count]).all()


def test_a_seed_and_an_offset_for_each():
    rows, seeds = np.arange(4, dtype=np.uint64), np.array([9, 2**63, 0, 5], np.uint64)
    offsets = np.array([0, 1, 2, 3], np.uint64)
    got = words(seeds, rows, offsets, 6)
    for i in range(4):
        alone = words(int(seeds[i]), rows[i : i + 1], int(offsets[i]), 6)
        assert (got[i] == alone[0]).all()


def test_uniforms_are_above_0_and_up_to_1():
    drawn = uniforms(0, np.arange(1000, dtype=np.uint64), 0, 100)
    assert drawn.dtype == np.float32 and drawn.min() > 0 and drawn.max() <= 1
    # As curand_uniform makes them: 0x6627e8d5 and 0xe169c58d.
    assert float(drawn[0, 0]).hex() == "0x1.989fa40000000p-2"
    assert abs(drawn.mean() - 0.5) < 6 / (12 * drawn.size) ** 0.5
