"""What test_fork.py's worker processes do; they import it."""

from __future__ import annotations

import numpy as np

import fi_ffi


def square(number: int) -> int:
    """By a kernel: rmsnorm of equal numbers is the weight."""
    x, weight = np.full((1, 8), 3, np.float16), np.full(8, number, np.float16)
    out = np.full_like(x, np.nan)
    fi_ffi.rmsnorm(out, x, weight, eps=0.0)
    assert (out == number).all()
    return int(out[0, 0]) ** 2
