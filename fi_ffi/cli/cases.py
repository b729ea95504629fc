"""Random calls of an op from its row, with what they must give and how far from it they may be.

For the tests and `fi-ffi demo`; nothing on the way of a call imports this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.ops.row import KvLayout, Row, Scalar, Tensor
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact import EXACT, MOVES

# Of the magnitude, for float32 arithmetic before the last rounding: 128 steps of float32.
FLOAT32_SLACK = 2.0**-16
# Pages of a cache that no request has.
SPARE_PAGES = 3


@dataclass(frozen=True)
class Case:
    """Arguments of one call on the host, and what each written tensor must become."""

    row: Row
    arrays: dict[str, Array]
    scalars: dict[str, Any]
    # The value and its magnitude; None where every bit must be the value's.
    expected: dict[str, tuple[Array, Array | None]]

    def error(self, name: str, got: Array) -> tuple[float, float]:
        """The largest absolute error of a written tensor, and the largest error as a
        fraction of its bound (1 or less is right)."""
        value, magnitude = self.expected[name]
        if magnitude is None:
            same = value.shape == got.shape and value.tobytes() == got.tobytes()
            return (0.0, 0.0) if same else (np.inf, np.inf)
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
    tables: Mapping[str, Array] | None = None,
    **scalars: Any,
) -> Case:
    """Fresh random inputs; a tensor that is only written starts as NaN.

    `tables` are the index tensors of a paged cache; random ones are made where there are
    none.  What an op only moves is random bits, NaN and their payloads among them.
    """
    if tables is None and row.module == "page":
        tables = random_tables(sizes["nnz"], sizes["b"], sizes["page_size"], rng)
    if tables:
        sizes = {**_sizes_of(tables), **sizes}
    values = {
        arg.name: _value(arg, rng) for arg in row.args if isinstance(arg, (Scalar, KvLayout))
    } | scalars
    arrays: dict[str, Array] = {}
    for arg in row.tensors:
        axes = arg.axes_in(values.get("kv_layout", "NHD"))
        shape = [_size(name, sizes) for name in axes]
        dtype = DTYPES[dtypes.get(arg.dtype, arg.dtype)].numpy
        if tables and arg.name in tables:
            arrays[arg.name] = tables[arg.name].copy()
        elif row.formula in MOVES:
            count = math.prod(shape) * dtype.itemsize
            arrays[arg.name] = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(shape)
        elif not arg.reads:
            arrays[arg.name] = np.full(shape, np.nan, dtype)
        else:
            arrays[arg.name] = _random(arg, shape, rng).astype(dtype)
    return Case(row, arrays, values, _expected(row, arrays, values))


def _expected(
    row: Row, arrays: dict[str, Array], values: dict[str, Any]
) -> dict[str, tuple[Array, Array | None]]:
    if row.formula in MOVES:
        moved = MOVES[row.formula](arrays | values)
        return {name: (array, None) for name, array in moved.items()}
    inputs: dict[str, Any] = {name: array.astype(np.float64) for name, array in arrays.items()}
    inputs["largest"] = {name: float(ml_dtypes.finfo(a.dtype).max) for name, a in arrays.items()}
    return {**EXACT[row.formula](inputs | values)}


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    base, _, more = axis.partition("+")
    return int(base) if base.isdigit() else sizes[base] + int(more or 0)


def _value(arg: Scalar | KvLayout, rng: np.random.Generator) -> Any:
    """The default, or something positive where there is none."""
    if isinstance(arg, Scalar) and arg.default is None:
        return arg.type(np.exp(rng.uniform(-4, 1)))
    return arg.default


def _random(arg: Tensor, shape: list[int], rng: np.random.Generator) -> Array:
    if arg.name == "scale":
        return np.exp(rng.uniform(-4, 1, shape))
    # Rows of different sizes, so that a row normalised by another's scale is seen.
    spread = np.exp(rng.uniform(-2, 2, [*shape[:-1], 1])) if len(shape) > 1 else 1.0
    values: Array = rng.standard_normal(shape) * spread
    return values


def random_tables(
    nnz: int, requests: int, page_size: int, rng: np.random.Generator
) -> dict[str, Array]:
    """`page_tables` of `nnz` new tokens dealt out to requests that have some already."""
    new = np.bincount(rng.integers(0, requests, nnz), minlength=requests)
    return page_tables(new, rng.integers(0, 2 * page_size + 1, requests), page_size, rng)


def page_tables(
    new: Sequence[int] | Array, before: Sequence[int] | Array, page_size: int,
    rng: np.random.Generator,
) -> dict[str, Array]:  # fmt: skip
    """The index tensors for `new` tokens of each request after those it had `before`.

    Pages lie in no order, and neither do the tokens.
    """
    before, length = np.asarray(before), np.asarray(before) + np.asarray(new)
    indptr = np.concatenate([[0], np.cumsum(-(-length // page_size))])
    positions = np.concatenate([np.arange(*ends) for ends in zip(before, length, strict=True)])
    order = rng.permutation(len(positions))
    tables = {
        "batch_indices": np.repeat(np.arange(len(length)), length - before)[order],
        "positions": positions[order],
        "kv_indices": rng.permutation(indptr[-1] + SPARE_PAGES)[: indptr[-1]],
        "kv_indptr": indptr,
        "kv_last_page_len": np.where(length > 0, (length - 1) % page_size + 1, 0),
    }
    return {name: table.astype(np.int32) for name, table in tables.items()}


def _sizes_of(tables: Mapping[str, Array]) -> dict[str, int]:
    indices = len(tables["kv_indices"])
    return {
        "nnz": len(tables["positions"]),
        "b": len(tables["kv_last_page_len"]),
        "num_indices": indices,
        "num_pages": indices + SPARE_PAGES,
    }
