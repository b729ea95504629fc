"""Fresh inputs, and how attention's results are judged here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fi_ffi.reference.attention.formula import Exact

from tests.helpers.rounding import half_step

FLOAT32 = 2.0**-19


def _worst(error: np.ndarray, allowed: np.ndarray) -> float:
    if not error.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        return float(np.where(error == 0, 0, error / allowed).max())


@pytest.fixture
def error() -> Callable[..., float]:
    """The largest error as a fraction of what is allowed; above 1 is wrong, as is NaN.

    Allowed are half a step of the output's dtype, and what float32 arithmetic makes of
    the terms: of each product, and of the sums.
    """

    def error(exact: Exact, out: np.ndarray, lse: np.ndarray | None = None) -> float:
        logits = FLOAT32 * (1 + exact.spread)
        allowed = half_step(exact.out, out.dtype) + 2 * logits[..., None] * exact.magnitude
        worst = _worst(np.abs(out.astype(np.float64) - exact.out), allowed)
        if lse is None:
            return worst
        lse2 = exact.lse2
        same = lse2 == lse
        of_lse = np.where(same, 0, np.abs(np.where(same, 0, lse2) - np.where(same, 0, lse)))
        allowed = 2 * logits + FLOAT32 * np.abs(np.where(same, 0, lse2))
        return float(np.maximum(worst, _worst(of_lse, allowed)))  # Python's max drops a NaN

    return error
