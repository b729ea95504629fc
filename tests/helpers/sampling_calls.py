"""Calls of the samplers, and what their tokens' distributions must be: for the CPU and a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case

SAMPLERS = (
    "sampling_from_probs", "top_k_sampling_from_probs", "top_p_sampling_from_probs",
    "min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs",
)  # fmt: skip
DRAWING = (*SAMPLERS, "sampling_from_logits")
ARRAYS = ("maybe_top_k_arr", "maybe_top_p_arr", "maybe_min_p_arr")
SEEDS = ("maybe_seed_arr", "maybe_offset_arr")
# The chance that a right distribution is refused.
_ALPHA = 1e-6
# Neighbours among the floats.  Thirds between two of them are rounded to the lower one: the search
# for what sums to TOP_P stays where it was.
CLOSE = [float.fromhex(f"0x1.0f8a{end}p-3") for end in ("46", "44", "44", "46", "40")]
APART = [0.3, 0.25, 0.2, 0.15, 0.1]
TOP_P = 0.2759037911891937


def make(
    name: str, rng: np.random.Generator, *, n: int = 7, r: int | None = None, h: int = 100,
    dtype: str = "int32", seeds: str = "int64", **more: Any,
) -> Case:  # fmt: skip
    """A case of a sampler."""
    dtypes = {"I": dtype, "S": seeds}
    return make_case(OPS[name].row, {"n": n, "r": n if r is None else r, "h": h}, dtypes, rng,
                     **more)  # fmt: skip


def run(
    machine: Any, name: str, arrays: Mapping[str, np.ndarray], **scalars: Any
) -> dict[str, np.ndarray]:
    """What an op makes of these arrays, on a machine."""
    machine.need(OPS[name].row.module)
    placed = {key: machine.place(array) for key, array in arrays.items()}
    descs = {key: array.desc() for key, array in placed.items()}
    OPS[name](**descs, **scalars, stream=machine.stream)
    made = {arg.name: placed[arg.name] for arg in OPS[name].row.tensors if arg.name in placed}
    assert all(array.intact() for array in made.values())
    return {key: array.get() for key, array in made.items()}


def draws(machine: Any, name: str, source: np.ndarray, count: int, **more: Any) -> np.ndarray:
    """So many tokens of one row."""
    row = OPS[name].row
    first = next(arg.name for arg in row.tensors)
    arrays = {
        first: source[None].astype(np.float32),
        "output": np.full(count, -1, np.int32),
        "maybe_indices": np.zeros(count, np.int32),
    }
    if any(arg.name == "valid" for arg in row.tensors):
        arrays["valid"] = np.zeros(count, np.bool_)
    got = run(machine, name, arrays, **more)
    assert got.get("valid", np.ones(1, np.bool_)).all()
    tokens: np.ndarray = got["output"]
    assert ((tokens >= 0) & (tokens < len(source))).all()
    return tokens


def filtered(name: str, source: np.ndarray, **given: Any) -> np.ndarray:
    """A sampler's distribution, from its definition, in float64."""
    if name == "sampling_from_logits":
        powers = np.exp(source.astype(np.float64) - source.max())
        whole: np.ndarray = powers / powers.sum()
        return whole
    p = source.astype(np.float32).astype(np.float64)
    order = np.argsort(-p)
    is_less = p[order][None] > p[:, None]
    above, mass = is_less.sum(1), (is_less * p[order][None]).sum(1)
    kept = p > 0
    if "top_k_val" in given:
        kept &= above < given["top_k_val"]
    if "top_p_val" in given:
        kept &= mass < given["top_p_val"]
    if "min_p_val" in given:
        kept &= p >= p.max() * given["min_p_val"]
    left: np.ndarray = np.where(kept, p, 0) / p[kept].sum()
    return left


def surprise(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square of counts over what is allowed of it: more than 1 is another distribution."""
    total = counts.sum()
    if counts[expected == 0].any():
        return np.inf
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order] * total
    # Those that are expected less than 8 times are one.
    rare = int(np.searchsorted(np.cumsum(expected), 8.0, side="left")) + 1
    starts = np.concatenate([[0], np.arange(rare, len(expected))])
    counts, expected = (np.add.reduceat(of, starts) for of in (counts, expected))
    freedom = len(counts) - 1
    if freedom < 1:
        return 0.0
    chi = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's approximation of the quantile.
    spread = 2 / (9 * freedom)
    z = NormalDist().inv_cdf(1 - _ALPHA)
    allowed: float = freedom * (1 - spread + z * spread**0.5) ** 3
    return chi / allowed
