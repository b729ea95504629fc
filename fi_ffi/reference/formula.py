"""The types of formulas: ops in float64, written from their definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, wide

# The part of the magnitude allowed for errors of float32 arithmetic before the last rounding: 128
# units in the last place.
SLACK = 2.0**-16
Inputs = dict[str, Any]
# Judges a result that may be one of many; returns the largest error, absolute and as a fraction of
# the allowed error (1 or less is right).
Judge: TypeAlias = "Callable[[Array], tuple[float, float]]"


@dataclass(frozen=True)
class OneOfMany:
    """A result of which many are right: one of them, and the judge of any."""

    value: Callable[[], Array]
    judge: Judge

    def __call__(self, got: Array) -> tuple[float, float]:
        return self.judge(got)


# For a written tensor, the value and the magnitude that its rounding errors scale with (None if all
# bits must match); or one right value and the judge.
Expected: TypeAlias = "tuple[Array, Array | None] | OneOfMany"
Exact: TypeAlias = "Mapping[str, Expected]"
Formula: TypeAlias = "Callable[[Inputs], Exact]"
Move: TypeAlias = "Callable[[Inputs], dict[str, Array]]"


def as_inputs(values: Mapping[str, Any]) -> Inputs:
    """Convert arguments for formulas: arrays in float64, 64-bit integers unchanged, and the largest
    value of each array's dtype."""
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    largest = {
        name: float(ml_dtypes.finfo(array.dtype).max)
        for name, array in arrays.items()
        if array.dtype.kind not in "iub"
    }
    # A 64-bit integer may be a seed, which float64 cannot hold.
    exact = {
        name: array.copy() if array.dtype in (np.int64, np.uint64) else wide(array)
        for name, array in arrays.items()
    }
    return {**values, **exact, "largest": largest}
