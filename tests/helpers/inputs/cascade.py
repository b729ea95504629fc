"""Random attention states, and masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.ops.row import Row
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Inputs, Made


def make(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """A mask of 0 and others."""
    made = dict(tables or {})
    if "mask" not in without:
        made.setdefault("mask", rng.integers(0, 3, sizes["n"]))
    return made, sizes, scalars


_SMALL = {"n": 4, "num_index_sets": 3, "num_heads": 2, "head_dim": 64}
_USUAL = {"n": 32, "num_index_sets": 4, "num_heads": 32, "head_dim": 128}
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "cascade": Inputs(_SMALL, _USUAL),
    "merge_state_in_place": Inputs(
        _SMALL, _USUAL, make=make, variants={"no mask": {"without": ("mask",)}}
    ),
}
