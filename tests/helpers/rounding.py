"""How far apart the numbers of a dtype are: what rounding to it may be off by."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def step(value: Any, dtype: Any) -> Any:
    """The distance between neighbours of a dtype at a value, which is the same below its smallest
    normal number as there."""
    info = ml_dtypes.finfo(dtype)
    return np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal))


def half_step(value: Any, dtype: Any) -> Any:
    """The largest error of rounding a value to a dtype, and a thousandth for the value's own."""
    return 0.5005 * step(value, dtype)
