"""Gated activations of every number there is: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers.calls import EVERY_CALL
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on
from tests.ops.test_results import GATED

CALLS = [call for call in EVERY_CALL if call.values[0].row.name in GATED]


def every(dtype: str) -> np.ndarray:
    """Every value of a 16-bit dtype that is finite."""
    values = np.arange(2**16, dtype=np.uint16).view(fi_ffi.DTYPES[dtype].numpy)
    return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("factor", [1.0, -1.5, 2.0**-14, 0.0])
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_every_number(op, dtypes, factor, machine):
    """Of the largest, which are infinite after a product, the sign is left."""
    numbers = every(dtypes["T"])
    numbers = np.concatenate([numbers, numbers[: -len(numbers) % 8]]).reshape(-1, 8)
    other = np.full_like(numbers, factor)
    case = make_case(
        op.row, {"n": len(numbers), "d": 8}, dtypes, np.random.default_rng(),
        {"input": np.concatenate([numbers, other], axis=1)},
    )  # fmt: skip
    value, magnitude = case.expected["out"]
    largest = float(ml_dtypes.finfo(numbers.dtype).max)
    fits = np.abs(value) <= largest

    def worst(got: np.ndarray) -> tuple[float, float]:
        if not (np.where(fits, 0, got) == np.where(fits, 0, np.copysign(np.inf, value))).all():
            return np.inf, np.inf
        cut = {"out": (np.where(fits, value, 0), np.where(fits, magnitude, 0))}
        return replace(case, expected=cut).error("out", np.where(fits, got, np.zeros_like(got)))

    assert check_on(machine, replace(case, expected={"out": worst})) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_infinities_and_nan_stay_where_they_are(op, dtypes, machine, rng):
    """The limit at minus infinity is 0; kernels give NaN for 0 times infinity, and so do we."""
    case = make_case(op.row, {"n": 3, "d": 16}, dtypes, rng)
    x = case.arrays["input"]
    x[0, 1], x[0, 2], x[0, 3], x[1, 16 + 4] = np.nan, -np.inf, np.inf, np.nan
    x[0, 16 + 3] = 1
    expected = np.zeros((3, 16))
    expected[0, 1] = expected[0, 2] = expected[1, 4] = np.nan
    expected[0, 3] = np.inf

    def strange(got: np.ndarray) -> tuple[float, float]:
        found = got.astype(np.float64)
        found = np.where(np.isfinite(found), 0, found)
        return (0.0, 0.0) if np.array_equal(found, expected, equal_nan=True) else (np.inf, np.inf)

    assert check_on(machine, replace(case, expected={"out": strange})) <= 1
