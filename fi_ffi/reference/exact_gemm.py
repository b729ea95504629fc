"""Ops of `fi_ffi.ops.table.gemm` in float64, from their definition: see exact.py."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs, Judge, Move, OneOfMany

# Hopper's tensor cores add products of fp8 values, 32 at a time, in numbers of some 14 bits.  Of
# the sum of the terms' sizes that costs an element less than this,
_FP8_SLACK = 2.0**-10
# and all elements together, of their norm, less than this after the first 32 terms; it grows
# with the square root of how many there are.
_FP8_NORM, _FP8_GROUP = 2.0**-10, 32
_ROUNDED = 2.0**-8  # of the norm, for rounding to bfloat16


def _norm(x: Array) -> float:
    """The root of the sum of squares, of values whose squares may be too large."""
    largest = float(np.abs(x).max(initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if largest else 0.0


def fp8_products(value: Array, magnitude: Array, terms: int, doubt: Array | float = 0.0) -> Judge:
    """Judges products of fp8 matrices that a GPU's tensor cores have added up.

    `magnitude` is the sum of the sizes of what was added, `terms` how much of it there was in
    numbers of few bits; `doubt` is how much else the value may be off.
    """
    norm = _ROUNDED + _FP8_NORM * max(terms / _FP8_GROUP, 1.0) ** 0.5

    def judge(got: Array) -> tuple[float, float]:
        if not value.size:
            return 0.0, 0.0
        info = ml_dtypes.finfo(got.dtype)
        error = np.abs(got.astype(np.float64) - value)
        error = np.where(np.isfinite(error), error, np.inf)
        step = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal))
        each = (error / (step / 2 * (1 + 2.0**-10) + magnitude * _FP8_SLACK + doubt)).max()
        of_all = _norm(error) if np.isfinite(error).all() else np.inf
        least = np.maximum(doubt, float(info.smallest_subnormal))
        allowed = norm * _norm(value) + _norm(np.broadcast_to(least, value.shape))
        return float(error.max()), float(max(each, of_all / allowed))

    return judge


def bmm_fp8(a: Inputs) -> Exact:
    scale = a["A_scale"][0] * a["B_scale"][0]
    value = np.einsum("bmk,bkn->bmn", a["A"], a["B"], optimize=True) * scale
    sizes = np.einsum("bmk,bkn->bmn", abs(a["A"]), abs(a["B"]), optimize=True) * abs(scale)
    return {"D": OneOfMany(lambda: value, fp8_products(value, sizes, a["A"].shape[-1]))}


def tinygemm2(a: Inputs) -> Exact:
    bias = a.get("bias", np.zeros(1))
    value = a["input"] @ a["weight"].T + bias
    return {"output": (value, np.abs(a["input"]) @ np.abs(a["weight"].T) + np.abs(bias))}


def router(a: Inputs) -> Exact:
    sizes = np.abs(a["mat_a"]) @ np.abs(a["mat_b"])
    return {"out": (a["mat_a"] @ a["mat_b"], sizes)}


def fp8_quantize_1x128(a: Inputs) -> Exact:
    x, before = a["input"], a["outScaleFP8SF"]
    pieces = x.reshape(len(x), x.shape[1] // 128, 128)
    largest = np.abs(pieces).max(axis=-1)
    scale = np.where(largest > 0, largest / 448, 1.0)
    values = (pieces / scale[..., None]).reshape(x.shape)

    def judge(got: Array) -> tuple[float, float]:
        rest = got[:, len(x) :].astype(np.float64)
        if not np.array_equal(rest, before[:, len(x) :], equal_nan=True):
            return np.inf, np.inf  # it wrote beyond its rows
        error = np.abs(got[:, : len(x)] - scale.T)
        error = np.where(np.isfinite(error), error, np.inf)
        return float(error.max(initial=0)), float((error / scale.T).max(initial=0) / 2.0**-20)

    return {"outValueE4M3": (values, np.abs(values)), "outScaleFP8SF": judge}


EXACT: dict[str, Formula] = {
    "bmm_fp8": bmm_fp8,
    "tinygemm2": tinygemm2,
    "tinygemm2_nobias": tinygemm2,
    "mm_M1_16_K7168_N256": router,
    "mm_M1_16_K7168_N128": router,
    "mm_M1_16_K6144_N256": router,
    "fp8_quantize_1x128": fp8_quantize_1x128,
}
MOVES: dict[str, Move] = {}
