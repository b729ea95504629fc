"""Concatenating MLA's keys, from the definition."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Inputs, Move


def concat_mla_k(a: Inputs) -> dict[str, Array]:
    heads = a["k_nope"].shape[1]
    return {"k": np.concatenate([a["k_nope"], np.repeat(a["k_rope"], heads, axis=1)], axis=2)}


MOVES: dict[str, Move] = {"concat_mla_k": concat_mla_k}
