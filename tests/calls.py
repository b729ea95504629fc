"""Calls that the CPU and the GPU tests both make."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fi_ffi.ops.functions import OPS

# From one vector of 8 to the largest in use; 24, 127 and 1001 are not powers of two.
HIDDEN = (8, 24, 64, 127, 128, 1001, 2048, 4096, 7168, 16384)

# Every op, in every combination of its dtypes.
CALLS = [
    pytest.param(op, dict(zip(op.row.dtypes, dtypes, strict=True)), id=f"{name}-{'-'.join(dtypes)}")
    for name, op in OPS.items()
    for dtypes in itertools.product(*op.row.dtypes.values())
]


def padded(array: np.ndarray, pad: int) -> np.ndarray:
    """The same values, with `pad` elements of NaN between rows of the last axis."""
    wide = np.full((*array.shape[:-1], array.shape[-1] + pad), np.nan, array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide[..., : array.shape[-1]]
