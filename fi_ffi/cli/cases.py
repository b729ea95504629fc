"""Random calls of an op from its row, with what they must give and how far from it they may be.

For the tests and `fi-ffi demo`; nothing on the way of a call imports this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.ops.ragged import checkpoint_cu_starts
from fi_ffi.ops.row import KvLayout, Row, Scalar, Tensor
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact import EXACT, MOVES

# Of the magnitude, for float32 arithmetic before the last rounding: 128 steps of float32.
FLOAT32_SLACK = 2.0**-16
# Of the magnitude, for arithmetic whose intermediate results are rounded: steps of their dtype.
ROUNDING_STEPS = 0.75
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
        slack = FLOAT32_SLACK
        if self.row.rounding:
            slack = ROUNDING_STEPS * float(ml_dtypes.finfo(self._rounded_to).eps)
        difference = np.abs(got.astype(np.float64) - value)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        return float(difference.max()), float(
            (difference / bound(value, magnitude, got.dtype, slack)).max()
        )

    @property
    def _rounded_to(self) -> np.dtype[Any]:
        of = next(arg for arg in self.row.tensors if arg.dtype == self.row.rounding)
        return self.arrays[of.name].dtype


def bound(
    value: Array, magnitude: Array, dtype: np.dtype[Any], slack: float = FLOAT32_SLACK
) -> Array:
    """The error allowed at each element: half a step of the dtype, and the arithmetic's slack."""
    info = ml_dtypes.finfo(dtype)
    half_step = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal)) / 2
    allowed: Array = half_step * (1 + 2.0**-10) + magnitude * slack
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
    without: Collection[str] = (),
    **scalars: Any,
) -> Case:
    """Fresh random inputs; a tensor that is only written starts as NaN.

    `tables` are the index tensors of a paged cache or of ragged sequences; random ones are
    made where there are none.  What an op only moves is random bits, NaN and their payloads
    among them.  Optional tensors are left out where `without` names them.
    """
    if row.module in RAGGED:
        tables, sizes, scalars = RAGGED[row.module](row, tables, sizes, scalars, without, rng)
    elif row.module == "page":
        if tables is None:
            tables = random_tables(sizes["nnz"], sizes["b"], sizes["page_size"], rng)
        sizes = {**_sizes_of(tables), **sizes}
    values = {
        arg.name: _value(arg, rng) for arg in row.args if isinstance(arg, (Scalar, KvLayout))
    } | scalars
    arrays: dict[str, Array] = {}
    for arg in row.tensors:
        if arg.name in without:
            continue
        axes = arg.axes_in(values.get("kv_layout", "NHD"))
        shape = [_size(name, sizes) for name in axes]
        dtype = DTYPES[dtypes.get(arg.dtype, arg.dtype)].numpy
        if tables and arg.name in tables:
            arrays[arg.name] = tables[arg.name].astype(dtype)
        elif row.formula in MOVES:
            count = math.prod(shape) * dtype.itemsize
            arrays[arg.name] = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(shape)
        elif not arg.reads:
            poison = 0xFF if dtype.kind in "iu" else np.nan
            arrays[arg.name] = _aligned(np.full(shape, poison, dtype), arg.alignment)
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
    inputs["largest"] = {
        name: float(ml_dtypes.finfo(a.dtype).max)
        for name, a in arrays.items()
        if a.dtype.kind not in "iu"
    }
    return {**EXACT[row.formula](inputs | values)}


def _aligned(array: Array, alignment: int) -> Array:
    """A copy at an address that is a multiple of `alignment`."""
    room = np.empty(array.nbytes + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    copy: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


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


def ragged_sequences(
    row: Row,
    tables: Mapping[str, Array] | None,
    sizes: Mapping[str, int],
    scalars: dict[str, Any],
    without: Collection[str],
    rng: np.random.Generator,
) -> tuple[dict[str, Array], dict[str, int], dict[str, Any]]:
    """Inputs of the gated delta rule, its sizes, and its scalars.

    Keys and queries are of length 1, gates from 0 to 1, and the state before has columns of
    length 1, as what a layer hands on has.
    """
    tokens, heads, size = sizes["total_seq_len"], sizes["num_v_heads"], sizes["head_size"]
    of_q = sizes["num_q_heads"]
    sizes = {**sizes, "num_sab_heads": max(of_q, heads), "num_k_heads": min(of_q, heads)}
    made = dict(tables or {})
    if "cu_seqlens" not in made:
        inner = rng.choice(np.arange(1, tokens), sizes["num_seqs"] - 1, replace=False)
        made["cu_seqlens"] = np.array([0, *sorted(inner), tokens])
    sizes["num_seqs"] = count = len(made["cu_seqlens"]) - 1

    def unit(*shape: int) -> Array:
        values: Array = rng.standard_normal(shape)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
        return values

    made.setdefault("q", unit(tokens, of_q, size))
    made.setdefault("k", unit(tokens, sizes["num_k_heads"], size))
    made.setdefault("input_state", unit(count, sizes["num_sab_heads"], size, size))
    made.setdefault("alpha", rng.uniform(0.7, 1, (tokens, sizes["num_sab_heads"])))
    made.setdefault("beta", rng.uniform(0, 1, (tokens, sizes["num_sab_heads"])))
    every = scalars.get("checkpoint_every_n_tokens", 64 * ("state_checkpoints" not in without))
    if any(arg.name == "checkpoint_every_n_tokens" for arg in row.args):
        scalars = scalars | {"checkpoint_every_n_tokens": every}
    if every:
        made["checkpoint_cu_starts"] = checkpoint_cu_starts(made["cu_seqlens"], every)
        sizes["total_checkpoints"] = int(made["checkpoint_cu_starts"][-1])
    return made, sizes, scalars


# Modules whose inputs are not independent of one another.
RAGGED: dict[str, Callable[..., Any]] = {"gdn_prefill_sm90": ragged_sequences}
