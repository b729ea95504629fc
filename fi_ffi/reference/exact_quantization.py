"""Packing bits, from its definition: see exact.py."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Formula, Inputs, Move


def _packed(x: Array, bitorder: str) -> Array:
    powers = 2 ** np.arange(8) if bitorder == "little" else 2 ** np.arange(7, -1, -1)
    whole = np.zeros(len(x) + -len(x) % 8, np.int64)
    whole[: len(x)] = x
    packed: Array = (whole.reshape(-1, 8) * powers).sum(axis=1).astype(np.uint8)
    return packed


def packbits(a: Inputs) -> dict[str, Array]:
    return {"y": _packed(a["x"], a["bitorder"])}


def segment_packbits(a: Inputs) -> dict[str, Array]:
    after = a["y"].copy()
    starts = a["input_indptr"]
    for start, stop, first in zip(starts, starts[1:], a["output_indptr"], strict=False):
        bits = _packed(a["x"][start:stop], a["bitorder"])
        after[first : first + len(bits)] = bits
    return {"y": after}


EXACT: dict[str, Formula] = {}
MOVES: dict[str, Move] = {"packbits": packbits, "segment_packbits": segment_packbits}
