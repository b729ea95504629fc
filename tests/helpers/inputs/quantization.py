"""Random bits, and segments of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.ops.on_host import packed_indptr
from fi_ffi.ops.row import Row
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Inputs, Made

# Bytes that no segment has.
SPARE = 3


def make(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """Bits, and where segments start: some of them may be empty."""
    made, n = dict(tables or {}), sizes["n"]
    made.setdefault("x", rng.integers(0, 2, n))
    if row.name == "packbits":
        return made, {**sizes, "n": len(made["x"]), "num_bytes": -(-len(made["x"]) // 8)}, scalars
    if "input_indptr" not in made:
        inner = np.sort(rng.integers(0, n + 1, sizes["b"] - 1))
        made["input_indptr"] = np.array([0, *inner, n])
    made.setdefault("output_indptr", packed_indptr(made["input_indptr"]))
    ends = made["output_indptr"][:-1] + -(-np.diff(made["input_indptr"]) // 8)
    sizes = {**sizes, "n": len(made["x"]), "b": len(made["input_indptr"]) - 1}
    return made, {**sizes, "num_bytes": int(max(ends, default=0)) + SPARE}, scalars


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "quantization": Inputs(small={"n": 61, "b": 3}, usual={"n": 2**16, "b": 8}, make=make)
}
