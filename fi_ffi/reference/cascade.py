"""Merging attention states in float64, from their definition.

A state over keys with base-2 logits l and values x is s = log2(sum(2^l)) and v = sum(2^(l - s) x).
The state of several sets of keys follows from theirs. Before FlashInfer 0.7.0, the kernels'
infinity is 5e4: a merge of many states begins with one or more at -5e4, which count, and two states
at minus infinity merge to NaN.
"""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs, OneOfMany

# FlashInfer's minus infinity before 0.7.0: the log-sum-exp of no keys.
_EMPTY_LSE = -5e4
_HALF_SUBNORMAL = 2.0**-25  # half the distance between float16's smallest numbers


def _merged(v: Array, s: Array) -> tuple[Array, Array, Array]:
    """Merge states along axis 1; return the output, the sum of its terms' magnitudes, and s."""
    with np.errstate(invalid="ignore"):  # all at minus infinity: no keys
        lse = np.logaddexp2.reduce(s, axis=1)
        weights = np.where(s == -np.inf, 0, np.exp2(s - lse[:, None]))
    value, terms = (np.einsum("nkhd,nkh->nhd", each, weights) for each in (v, np.abs(v)))
    return value, terms, lse


def _exact(
    names: tuple[str, str], v: Array, s: Array, v_error: float = 0.0, s_error: Array | float = 0.0
) -> dict[str, tuple[Array, Array]]:
    """Return results with their magnitudes.

    `v_error` is the relative error of the partial values that the kernel merges. `s_error` (n,
    heads) is the absolute error of their log-sum-exps.
    """
    value, terms, lse = _merged(v, s)
    # A log-sum-exp has the error of the sum of powers, whatever was subtracted from the logits.
    of_sum = 1 + np.log2(s.shape[1]) + s_error / SLACK + np.zeros(lse.shape)
    # An error of a log-sum-exp changes a weight, and the sum of weights that divides it.
    relative = v_error + 2 * np.log(2) * (s_error + np.zeros(lse.shape))[..., None]
    least = _HALF_SUBNORMAL / SLACK if v_error else 0.0
    return {names[0]: (value, terms * (1 + relative / SLACK) + least), names[1]: (lse, of_sum)}


def merge_state_of_empty_ones(a: Inputs) -> Exact:
    v, s = (np.stack([a[f"{name}_a"], a[f"{name}_b"]], axis=1) for name in "vs")
    return _exact(("v_merged", "s_merged"), v, s)


def merge_state_in_place_of_empty_ones(a: Inputs) -> Exact:
    v, s = (np.stack([a[name], a[f"{name}_other"]], axis=1) for name in "vs")
    chosen = a["mask"] != 0 if "mask" in a else np.full(len(v), True)
    merged = {}
    for name, (value, magnitude) in _exact(("v", "s"), v, s).items():
        where = chosen.reshape(-1, *[1] * (value.ndim - 1))
        merged[name] = np.where(where, value, a[name]), np.where(where, magnitude, 0)
    return merged


def _with_nan_for_empty(made: Exact, v: str, s: str) -> Exact:
    """Replace results by NaN where both states are at minus infinity, as kernels do that subtract
    them."""
    (value, terms), (lse, of_sum) = made[v], made[s]  # type: ignore[misc]
    is_nothing = lse == -np.inf
    value = np.where(is_nothing[..., None], np.nan, value)
    return {v: (value, terms), s: (np.where(is_nothing, np.nan, lse), of_sum)}


def merge_state(a: Inputs) -> Exact:
    return _with_nan_for_empty(merge_state_of_empty_ones(a), "v_merged", "s_merged")


def merge_state_in_place(a: Inputs) -> Exact:
    return _with_nan_for_empty(merge_state_in_place_of_empty_ones(a), "v", "s")


def _step(largest: float) -> float:
    """Return the distance from 1 to the next number, in the dtype with this largest number."""
    return float(2 - 2 * np.frexp(largest)[0])


def _rows_of_threads(head_dim: int) -> int:
    """Return the rows of threads that share a head's sets, of 128 threads in all; each begins with
    a state without keys, and so does who merges theirs."""
    return 128 // (head_dim // max(8, head_dim // 32))


def merge_states(a: Inputs, nothing: float = _EMPTY_LSE) -> Exact:
    v, s = a["v"], a["s"]
    n, sets = s.shape[:2]
    names = ("v_merged", "s_merged")
    if sets == 1 < n:  # a copy
        return {names[0]: (v[:, 0], np.abs(v[:, 0])), names[1]: (s[:, 0], np.ones_like(s[:, 0]))}
    errors: tuple[float, Array | float] = (0.0, 0.0)
    begun = 1
    if n <= sets:
        # Rows of threads pass on partial values in v's dtype, and partial log-sum-exps in float32.
        finite = np.abs(s, where=np.isfinite(s), out=np.zeros_like(s)).max(axis=1, initial=0)
        # What they begin with counts only where all sets are that low.
        finite = np.where(s.max(axis=1, initial=-np.inf) < nothing + 64, abs(nothing), finite)
        errors = _step(a["largest"]["v"]) / 2, 2.0**-24 * finite
        begun += _rows_of_threads(v.shape[-1])
    v, s = (np.insert(x, [0] * begun, first, axis=1) for x, first in ((v, 0.0), (s, nothing)))
    return _exact(names, v, s, *errors)


def merge_states_of_empty_ones(a: Inputs) -> Exact:
    """Merge as `merge_states`; the log-sum-exp of no sets is minus infinity."""
    made = merge_states(a, -np.inf)
    if a["s"].shape[1]:
        return made

    def is_nothing(got: Array) -> tuple[float, float]:
        return 0.0, 0.0 if (got == -np.inf).all() else np.inf

    none = np.full(a["s_merged"].shape, -np.inf)
    return {**made, "s_merged": OneOfMany(lambda: none, is_nothing)}


EXACT: dict[str, Formula] = {
    formula.__name__: formula
    for formula in (
        merge_state,
        merge_state_of_empty_ones,
        merge_state_in_place,
        merge_state_in_place_of_empty_ones,
        merge_states,
        merge_states_of_empty_ones,
    )
}
