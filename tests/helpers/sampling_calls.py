"""Calls of the samplers: for the CPU and a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import called
from tests.helpers.cases import make_case

SAMPLERS = (
    "sampling_from_probs", "top_k_sampling_from_probs", "top_p_sampling_from_probs",
    "min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs",
)  # fmt: skip
DRAWING = (*SAMPLERS, "sampling_from_logits")
ARRAYS = ("maybe_top_k_arr", "maybe_top_p_arr", "maybe_min_p_arr")
SEEDS = ("maybe_seed_arr", "maybe_offset_arr")
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
    """What an op makes of these arrays, on a machine; also by the names that they have in
    releases in which none of them is optional."""
    op = OPS[name]
    machine.need(op.row.module)
    written = [arg.name for arg in op.row.tensors if arg.writes]
    got = called(op, arrays, machine.place, written, **scalars, stream=machine.stream)
    return got | {name.removeprefix("maybe_"): array for name, array in got.items()}
