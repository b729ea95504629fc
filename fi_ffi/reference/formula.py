"""What a formula is: an op in float64, written from its definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array

# Of the magnitude that bounds allow for float32 arithmetic before the last rounding: 128 steps.
SLACK = 2.0**-16
Inputs = dict[str, Any]
# What judges a result that may be one of many: the largest error, and that as a fraction of
# what is allowed (1 or less is right).
Judge: TypeAlias = "Callable[[Array], tuple[float, float]]"


@dataclass(frozen=True)
class OneOfMany:
    """A result of which many are right: one of them, and the judge of any."""

    value: Callable[[], Array]
    judge: Judge

    def __call__(self, got: Array) -> tuple[float, float]:
        return self.judge(got)


# For every tensor that is written the value, and the magnitude that its rounding errors scale
# with (None where every bit must be the value's); or one value and the judge of all.
Expected: TypeAlias = "tuple[Array, Array | None] | OneOfMany"
Exact: TypeAlias = "Mapping[str, Expected]"
Formula: TypeAlias = "Callable[[Inputs], Exact]"
Move: TypeAlias = "Callable[[Inputs], dict[str, Array]]"


def as_inputs(given: Mapping[str, Any]) -> Inputs:
    """Arguments as formulas take them: arrays in float64, integers of 64 bits as they are, and the
    largest value of each array's dtype."""
    arrays = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    largest = {
        name: float(ml_dtypes.finfo(array.dtype).max)
        for name, array in arrays.items()
        if array.dtype.kind not in "iub"
    }
    # 64 bits may be a seed, which float64 cannot hold.
    exact = {
        name: array.copy() if array.dtype in (np.int64, np.uint64) else array.astype(np.float64)
        for name, array in arrays.items()
    }
    return {**given, **exact, "largest": largest}
