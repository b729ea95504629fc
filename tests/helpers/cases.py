"""Random calls of an op from its row, with what they must give."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import Case, case_of
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.row import KvLayout, Row, Scalar, Tensor, Text
from fi_ffi.reference import MOVES
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs import inputs_of
from tests.helpers.inputs.family import Call


def default_dtypes(row: Row) -> dict[str, str]:
    """The first dtype of each of the row's variables."""
    return {variable: names[0] for variable, names in row.dtypes.items()}


def make_case(row: Row, *args: Any, **scalars: Any) -> Case:
    """Arguments of `make_arguments`, and what the op must give of them."""
    return case_of(row, *make_arguments(row, *args, **scalars))


def make_arguments(
    row: Row,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str],
    rng: np.random.Generator,
    tables: Mapping[str, Array] | None = None,
    without: Collection[str] = (),
    **scalars: Any,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Fresh random inputs: arrays, and all else; a tensor that is only written starts as NaN.

    `tables` are the index tensors of a paged cache or of ragged sequences; random ones are
    made where there are none.  What an op only moves is random bits, NaN and their payloads
    among them.  Optional tensors are left out where `without` names them.
    """
    make, of_dtypes = inputs_of(row).make, inputs_of(row).of_dtypes
    if of_dtypes is not None:
        scalars = {**of_dtypes(dtypes), **scalars}
    call = Call(row, dict(tables or {}), dict(sizes), scalars, without, rng)
    if make is not None:
        make(call)
    tables, sizes = call.tables, call.sizes
    values = {
        arg.name: _value(arg, rng) for arg in row.args if isinstance(arg, (Scalar, Text, KvLayout))
    } | call.scalars
    arrays: dict[str, Array] = {}
    for arg in row.tensors:
        if arg.name in without:
            continue
        axes = arg.axes_in(values.get("kv_layout", "NHD"))
        shape = [parse_axis(name).size(sizes) for name in axes]
        dtype = DTYPES[dtypes.get(arg.dtype, arg.dtype)].numpy
        if arg.name in tables:
            arrays[arg.name] = _placed(tables[arg.name].astype(dtype), arg)
        elif row.formula in MOVES:
            count = math.prod(shape) * dtype.itemsize
            arrays[arg.name] = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(shape)
        elif not arg.reads:
            poison = 0xFF if dtype.kind in "iu" else np.nan
            arrays[arg.name] = _placed(np.full(shape, poison, dtype), arg)
        else:
            arrays[arg.name] = _placed(_random(arg, shape, rng).astype(dtype), arg)
        if arg.parts > 1:
            arrays[arg.name] = _part(arrays[arg.name], arg.parts)
    return arrays, values


def _placed(array: Array, arg: Tensor) -> Array:
    """The values as the argument wants them to lie: aligned, and transposed in memory."""
    if arg.zeroed:
        array[...] = 0
    if arg.transposed:
        other: Array = _aligned(array.swapaxes(-1, -2), arg.alignment).swapaxes(-1, -2)
        return other
    return _aligned(array, arg.alignment) if arg.alignment > 1 else array


def _part(array: Array, parts: int) -> Array:
    """The values as one of so many parts of a tensor, whose others are NaN."""
    size = array.shape[-1]
    part: Array = np.full((*array.shape[:-1], size * parts), np.nan, array.dtype)[..., :size]
    part[...] = array
    return part


def _aligned(array: Array, alignment: int) -> Array:
    """A copy at an address that is a multiple of `alignment`."""
    room = np.empty(array.nbytes + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    copy: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def aligned(count: int, alignment: int) -> Array:
    """So many bytes of zero, at an address that is a multiple of `alignment`."""
    return _aligned(np.zeros(count, np.uint8), alignment)


def _value(arg: Scalar | Text | KvLayout, rng: np.random.Generator) -> Any:
    """The default, or something positive where there is none."""
    if isinstance(arg, Text):
        return str(rng.choice(arg.words))
    if isinstance(arg, Scalar) and arg.default is None and not arg.size_of:
        return arg.type(np.exp(rng.uniform(-4, 1)))
    return arg.default


def _random(arg: Tensor, shape: list[int], rng: np.random.Generator) -> Array:
    if arg.name == "scale":
        return np.exp(rng.uniform(-4, 1, shape))
    # Rows of different sizes, so that a row normalised by another's scale is seen.
    spread = np.exp(rng.uniform(-2, 2, [*shape[:-1], 1])) if len(shape) > 1 else 1.0
    values: Array = _normal(shape, rng) * np.float32(spread)
    return values


# Normal quantiles, the outermost at 4.5: numpy's own normal numbers take five times as long.
_STEPS = 4096
_QUANTILES = np.array(
    [-4.5, *(NormalDist().inv_cdf(i / _STEPS) for i in range(1, _STEPS)), 4.5], np.float32
)
_GAPS = np.diff(_QUANTILES)


def _normal(shape: list[int], rng: np.random.Generator) -> Array:
    """Normal numbers, in float32: even ones between two quantiles."""
    even = rng.random(shape, np.float32) * _STEPS
    below = even.astype(np.int32)
    normal: Array = _QUANTILES.take(below) + (even - below.astype(np.float32)) * _GAPS.take(below)
    return normal
