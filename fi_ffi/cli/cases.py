"""Test cases of single calls: arguments on the host, expected results, and allowed errors.

Used by `fi-ffi demo` and `replay`, the tests and the benchmarks; calls themselves never import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.ops.call.row import Row
from fi_ffi.reference import EXACT, MOVES
from fi_ffi.reference.arrays import Array, wide
from fi_ffi.reference.formula import SLACK, Expected, Judge, as_inputs

# Slack for arithmetic with rounded intermediate results, in steps of their dtype, relative to the
# magnitude.
ROUNDING_STEPS = 0.75


@dataclass(frozen=True)
class Case:
    """Arguments of one call on the host, and the expected value of each written tensor."""

    row: Row
    arrays: dict[str, Array]
    scalars: dict[str, Any]
    # Value and magnitude; magnitude None requires equal bits. Or a function that judges the result:
    # it returns the largest error, absolute and as a fraction of the allowed error.
    expected: dict[str, Expected]

    def error(self, name: str, got: Array) -> tuple[float, float]:
        """Return a written tensor's largest absolute error, and its largest relative to the bound.

        A relative error of 1 or less is correct.
        """
        expected = self.expected[name]
        if not isinstance(expected, tuple):
            return expected(got)
        value, magnitude = expected
        if magnitude is None:
            same = value.shape == got.shape and value.tobytes() == got.tobytes()
            return (0.0, 0.0) if same else (np.inf, np.inf)
        if value.size == 0:
            return 0.0, 0.0
        slack = SLACK
        if self.row.rounding:
            slack = ROUNDING_STEPS * float(ml_dtypes.finfo(self._rounded_to).eps)
        return within(value, magnitude, slack)(got)

    @property
    def _rounded_to(self) -> np.dtype[Any]:
        of = next(arg for arg in self.row.tensors if arg.dtype == self.row.rounding)
        return self.arrays[of.name].dtype


def within(value: Array, magnitude: Array, slack: float) -> Judge:
    """Return a judge that allows rounding, and `slack` times the sum of magnitudes."""

    def judge(got: Array) -> tuple[float, float]:
        difference = np.abs(wide(got) - value)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        allowed = bound(value, magnitude, got.dtype, slack)
        return float(difference.max()), float((difference / allowed).max())

    return judge


def bound(value: Array, magnitude: Array, dtype: np.dtype[Any], slack: float = SLACK) -> Array:
    """Return each element's allowed error: half a step of the dtype, and the slack."""
    info = ml_dtypes.finfo(dtype)
    half_step = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal)) / 2
    allowed: Array = half_step * (1 + 2.0**-10) + magnitude * slack
    return allowed


def case_of(row: Row, arrays: Mapping[str, Array], scalars: Mapping[str, Any]) -> Case:
    """Return a call's case, judged by the float64 formula; `arrays` are as before the call.

    Raises `KeyError` if the row's formula does not exist.
    """
    values = {**arrays, **scalars}
    expected: dict[str, Expected]
    if row.formula in MOVES:
        moved = MOVES[row.formula](values)
        expected = {name: (array, None) for name, array in moved.items()}
    else:
        inputs = {name: value for name, value in values.items() if name in row.formula_names}
        expected = {**EXACT[row.formula](as_inputs(inputs))}
    return Case(row, {**arrays}, {**scalars}, expected)
