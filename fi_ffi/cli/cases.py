"""Random calls of an op from its row, with their float64 results and error bounds.

For the tests and `fi-ffi demo`; nothing on the way of a call imports this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.ops.row import Row, Scalar, Tensor
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact import EXACT, Exact

# Of the magnitude, for float32 arithmetic before the last rounding: 128 steps of float32.
FLOAT32_SLACK = 2.0**-16


@dataclass(frozen=True)
class Case:
    """Arguments of one call on the host, and what each written tensor must become."""

    row: Row
    arrays: dict[str, Array]
    scalars: dict[str, Any]
    expected: Exact

    def error(self, name: str, got: Array) -> tuple[float, float]:
        """The largest absolute error of a written tensor, and the largest error as a
        fraction of its bound (1 or less is right)."""
        value, magnitude = self.expected[name]
        if value.size == 0:
            return 0.0, 0.0
        difference = np.abs(got.astype(np.float64) - value)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        return float(difference.max()), float(
            (difference / bound(value, magnitude, got.dtype)).max()
        )


def bound(value: Array, magnitude: Array, dtype: np.dtype[Any]) -> Array:
    """The error allowed at each element: half a step of the dtype, and the float32 slack."""
    info = ml_dtypes.finfo(dtype)
    half_step = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal)) / 2
    allowed: Array = half_step * (1 + 2.0**-10) + magnitude * FLOAT32_SLACK
    return allowed


def default_dtypes(row: Row) -> dict[str, str]:
    """The first dtype of each of the row's variables."""
    return {variable: names[0] for variable, names in row.dtypes.items()}


def make_case(
    row: Row,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str],
    rng: np.random.Generator,
    **scalars: Any,
) -> Case:
    """Fresh random inputs; a tensor that is only written starts as NaN."""
    exact = EXACT[row.formula]
    arrays: dict[str, Array] = {}
    values = {arg.name: _value(arg, rng) for arg in row.args if isinstance(arg, Scalar)} | scalars
    for arg in row.tensors:
        shape = [int(name) if name.isdigit() else sizes[name] for name in arg.axis_names]
        dtype = DTYPES[dtypes.get(arg.dtype, arg.dtype)].numpy
        if not arg.reads:
            arrays[arg.name] = np.full(shape, np.nan, dtype)
        else:
            arrays[arg.name] = _random(arg, shape, rng).astype(dtype)
    inputs: dict[str, Any] = {name: array.astype(np.float64) for name, array in arrays.items()}
    inputs["largest"] = {name: float(ml_dtypes.finfo(a.dtype).max) for name, a in arrays.items()}
    return Case(row, arrays, values, exact(inputs | values))


def _value(arg: Scalar, rng: np.random.Generator) -> Any:
    """The default, or something positive where there is none."""
    return arg.type(np.exp(rng.uniform(-4, 1))) if arg.default is None else arg.default


def _random(arg: Tensor, shape: list[int], rng: np.random.Generator) -> Array:
    if arg.name == "scale":
        return np.exp(rng.uniform(-4, 1, shape))
    # Rows of different sizes, so that a row normalised by another's scale is seen.
    spread = np.exp(rng.uniform(-2, 2, [*shape[:-1], 1])) if len(shape) > 1 else 1.0
    values: Array = rng.standard_normal(shape) * spread
    return values
