"""Packing bits, from the definition."""

from __future__ import annotations

import itertools

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Inputs, Move


def _packed(x: Array, bitorder: str) -> Array:
    powers = 2 ** np.arange(8) if bitorder == "little" else 2 ** np.arange(7, -1, -1)
    whole = np.zeros(len(x) + -len(x) % 8, np.int64)
    whole[: len(x)] = x
    packed: Array = (whole.reshape(-1, 8) * powers).sum(axis=1).astype(np.uint8)
    return packed


def packbits(a: Inputs) -> dict[str, Array]:
    return {"y": _packed(a["x"], a["bitorder"])}


def segment_packbits(a: Inputs) -> dict[str, Array]:
    x, after = a["x"], a["y"].copy()
    segments = itertools.pairwise(a["input_indptr"].tolist())
    for i, (start, stop) in enumerate(segments):
        first, count = int(a["output_indptr"][i]), -(-(stop - start) // 8)
        after[first : first + count] = _packed(x[start:stop], a["bitorder"])
    return {"y": after}


MOVES: dict[str, Move] = {"packbits": packbits, "segment_packbits": segment_packbits}
