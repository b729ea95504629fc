"""Weights that are put together on their way to a device."""

from __future__ import annotations

import numpy as np
import pytest
from engine.weights import Blocks, Parts, together, whole


def drawn(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_parts_are_what_numpy_puts_together(rng):
    """Matrices one below another, and those of experts one behind another, without a copy."""
    for count in (1, 2, 5):
        pairs = [(drawn(rng, 3, 4), drawn(rng, 2, 4)) for _ in range(count)]
        rows = [together(pair) for pair in pairs]
        every = together(rows, is_stack=True)
        right = np.stack([np.concatenate(pair) for pair in pairs])
        assert every.shape == right.shape and len(every) == count and every.dtype == right.dtype
        assert (whole(every) == right).all()
        given = [part for pair in pairs for part in pair]
        assert all(one is other for one, other in zip(every.parts, given, strict=True))


def test_blocks_are_put_together_with_their_scales(rng):
    made = [Blocks(drawn(rng, 2, 8), drawn(rng, 1, 4)) for _ in range(3)]
    both = together(made, is_stack=True)
    assert isinstance(both.values, Parts) and both.shape == (3, 2, 8)
    for got, right in zip(whole(both), zip(*made, strict=True), strict=True):
        assert (got == np.stack(right)).all()


@pytest.mark.parametrize(
    "other", [np.zeros((2, 5), np.float32), np.zeros((2, 4), np.float16)], ids=["shape", "dtype"]
)
def test_other_kinds_are_refused(other, rng):
    with pytest.raises(ValueError, match=r"float32\(3, 4\).*are not of one kind"):
        together([drawn(rng, 3, 4), other])


def test_an_array_may_be_asked_for_in_another_dtype(rng):
    parts = together([drawn(rng, 2, 3), drawn(rng, 1, 3)])
    assert np.asarray(parts, np.float64).dtype == np.float64
    assert (np.asarray(parts, np.float64) == np.concatenate(parts.parts)).all()
