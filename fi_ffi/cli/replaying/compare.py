"""Results of a call that was made again, beside those of the first and those of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from fi_ffi.cli.cases import case_of
from fi_ffi.cli.replaying.recorded import Recorded, RecordedTensor
from fi_ffi.cli.replaying.rerun import POISON
from fi_ffi.ops.row import Row
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact import EXACT, MOVES

# Of a dtype's steps at an element and at the largest of its row, beside no better bound.
_STEPS = 2.0


@dataclass(frozen=True)
class Compared:
    """How far a result is from another, as a fraction of what is allowed (1 or less is right)."""

    name: str
    to: str
    is_same: bool
    max_error: float
    error_of_bound: float

    @property
    def status(self) -> str:
        return "ok" if self.error_of_bound <= 1 else "fail"


def bits(array: Array) -> Array:
    found: Array = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    return found


def filled(array: Array, fill: int) -> Array:
    """An array like it with this in every byte."""
    found: Array = np.full(array.nbytes, fill, np.uint8).view(array.dtype).reshape(array.shape)
    return found


def without_unwritten(recorded: Recorded, after: Mapping[str, Array]) -> dict[str, Array]:
    """What was written now; what neither call wrote is as the first left it."""
    found: dict[str, Array] = {}
    for name, got in after.items():
        found[name] = got = got.copy()
        tensor, then = recorded.tensors[name], (recorded.after or {}).get(name)
        if then is None or tensor.reads or tensor.elements is None:
            continue
        poison = bits(filled(got, POISON))
        unwritten = (bits(got) == poison) & (bits(then) == bits(tensor.elements))
        got[unwritten] = then[unwritten]
    return found


def beside(
    recorded: Recorded, got: Mapping[str, Array], wanted: Mapping[str, Array], to: str
) -> Iterator[Compared]:
    """Results beside others: what the first call wrote, or what the reference does."""
    for name, expected in wanted.items():
        if name in got:
            yield compared(name, to, got[name], expected, _eps(recorded.tensors, name))


def has_definition(row: Row) -> bool:
    """Whether there is a formula for it."""
    return row.formula in EXACT or row.formula in MOVES


def with_definition(row: Row, recorded: Recorded, got: Mapping[str, Array]) -> Iterator[Compared]:
    """Results beside the op's definition in float64."""
    arrays = {
        name: of.elements.copy() if of.reads else filled(of.elements, POISON)
        for name, of in recorded.tensors.items()
        if of.elements is not None and not of.is_scratch
    }
    values = {name: value for name, value in recorded.values.items() if value is not None}
    case = case_of(row, arrays, values)
    for name in case.expected:
        if name in got:
            error, fraction = case.error(name, got[name])
            yield Compared(name, "the definition in float64", fraction == 0, error, fraction)


def compared(name: str, to: str, got: Array, wanted: Array, eps: float) -> Compared:
    """Two results: numbers by steps of a dtype, all else bit by bit."""
    is_same = bool((bits(got) == bits(wanted)).all())
    if is_same:
        return Compared(name, to, True, 0.0, 0.0)
    if got.dtype.kind in "iub":
        return Compared(name, to, False, np.inf, np.inf)
    with np.errstate(all="ignore"):
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        alike = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(alike, 0.0, np.abs(a - b))
        difference = np.where(np.isfinite(difference), difference, np.inf)
        sizes = np.where(np.isfinite(b), np.abs(b), 0.0)
    largest = sizes.max(axis=-1, keepdims=True, initial=0.0) if b.ndim else sizes
    smallest = float(ml_dtypes.finfo(got.dtype).smallest_subnormal)
    allowed = np.maximum(_STEPS * eps * (sizes + largest), smallest)
    return Compared(name, to, False, float(difference.max()), float((difference / allowed).max()))


def _eps(tensors: Mapping[str, RecordedTensor], name: str) -> float:
    """The step of a result's dtype, or of the coarsest dtype that the call reads."""
    dtypes = {of.dtype for of in tensors.values() if of.reads and not of.is_scratch}
    dtypes.add(tensors[name].dtype)
    steps = []
    for dtype in dtypes:
        if dtype.lanes == 1 and dtype.numpy.kind not in "iub":
            steps.append(float(ml_dtypes.finfo(dtype.numpy).eps))
    return max(steps, default=0.0)
