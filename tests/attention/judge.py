"""How far from float64 a kernel's attention may be: from where it rounds, and to what.

The constants are here and nowhere else.  A bound is the sum of the worst cases of the
roundings below, so right results stay well under it; `test_judge.py` shows what does not:
a scale that is a little off, one key left out, one key too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_ffi.reference.attention.formula import Exact

from tests.helpers.rounding import half_step

# What rounding to a dtype takes of a value at most: half a step.
HALF_STEP = {
    "float16": 2.0**-11, "bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3,
}  # fmt: skip
# float32 sums of a head's products, exp2.approx and lg2.approx (2^-22 each), and the
# multiplications around them.
FLOAT32 = 2.0**-19
# Tensor cores add 16 products at a time to a float32 sum and cut off what does not fit:
# a last bit, 2^-23, of the sum each time.  For a sum over the keys, by the key.
PER_KEY = 2.0**-23 / 16
# With fp8 they add 32 at a time and keep 14 bits; 8 steps are a head's products.
FP8_LOGITS, FP8_PER_KEY = 8 * 2.0**-14, 2.0**-13 / 32
# tanh.approx, of its result.
TANH = 2.0**-11
# Rotated pairs: float32 angles of positions up to n are off by n * 2^-21 (`__powf`, their
# product, and the range reduction of `__sincosf`); of queries and keys, and twice where an
# element is small beside its pair.
ANGLE = 4 * 2.0**-21
# A row that sees no key: the kernels' logarithm is about -5e4 to base 2, or -infinity.
NO_KEY = -3e4
# Requests of no more keys are not split: 128 // page_size pages are the least piece of the
# planners, `kv_len_limit` is MLA's and batch attention's, and calls for one request have their own.
LEAST_PIECE = {"batch_attention": 64, "batch_prefill": 64, "batch_decode": 64,
               "single_prefill": 256, "single_decode": 256, "batch_mla": 32}  # fmt: skip


@dataclass(frozen=True)
class Rounding:
    """What is rounded on the way, as fractions; the defaults are float32 and nothing else."""

    # Exponentials, before values are multiplied by them.
    shares: float = 0.0
    # Those that are added up, where they are the rounded ones.
    sums: float = 0.0
    # Outputs of a split request's pieces, of requests with more keys than `least_piece`.
    pieces: float = 0.0
    least_piece: int = 0
    # Logits, of the sum of their terms' magnitudes; and more of it for each position.
    logits: float = FLOAT32
    angles: float = 0.0
    per_key: float = PER_KEY


def rounding(
    family: str, backend: str, q: str, kv: str, o: str, *, soft_cap: bool = False,
    rope: bool = False, least_piece: int | None = None,
) -> Rounding:  # fmt: skip
    """A kernel's: prefill.cuh, decode.cuh, mla.cuh, mla_hopper.cuh, hopper/mainloop_mma.cuh."""
    fp8 = q in ("float8_e4m3fn", "float8_e5m2")
    logits, angles = FP8_LOGITS if fp8 else FLOAT32, 0.0
    if soft_cap:
        logits += TANH
    if rope:
        # Prefill turns q and k where they lie, in their dtype; decode in registers.
        logits += 0.0 if "decode" in family else 2 * HALF_STEP[q]
        angles = ANGLE
    # Decode has no tensor cores, and exponentials stay float32; fa3 adds them up before.
    # Those of MLA are of the queries' dtype, as its cache is by then.
    of = kv if backend == "fa3" and family != "batch_mla" else q
    shares = 0.0 if "decode" in family else HALF_STEP[of]
    sums = 0.0 if backend == "fa3" else shares
    splits = backend != "fa3" or family == "batch_mla"
    least = LEAST_PIECE[family] if least_piece is None else least_piece
    return Rounding(
        shares, sums, HALF_STEP[o] if splits else 0.0, least, logits, angles,
        FP8_PER_KEY if fp8 else PER_KEY,
    )  # fmt: skip


def reference(q: str, *, rope: bool, prefill: bool) -> Rounding:
    """That of the numpy kernels: float32, and RoPE where the prefill kernels round it."""
    logits = FLOAT32 + (2 * HALF_STEP[q] if rope and prefill else 0.0)
    return Rounding(logits=logits, angles=ANGLE if rope else 0.0)


def worst(
    exact: Exact, out: Any, lse: Any, how: Rounding, keys: int, *, base_e: bool = False
) -> float:
    """The largest error as a fraction of what is allowed there; NaN counts as infinite.

    `keys` is how many the request has.
    """
    logits = (how.logits + how.angles * keys) * (1 + exact.spread)
    pieces = how.pieces if keys > how.least_piece else 0.0
    of_magnitude = how.shares + pieces + 2 * how.per_key * keys
    allowed = half_step(exact.out, out.dtype) + how.sums * np.abs(exact.out)
    allowed += (of_magnitude + 2 * logits[..., None]) * exact.magnitude
    found = _largest(np.abs(out.astype(np.float64) - exact.out), allowed)
    if lse is None:
        return found
    unit = np.log(2) if base_e else 1.0
    blind = exact.lse2 == -np.inf
    expected = np.where(blind, 0.0, exact.lse2 * unit)
    # Rows that see no key only have to say so.
    difference = np.where(blind, np.where(lse <= NO_KEY, 0.0, np.inf), np.abs(lse - expected))
    relative = (logits + how.sums + how.per_key * keys) * np.log2(np.e) * unit
    return max(found, _largest(difference, relative + FLOAT32 * (1 + np.abs(expected))))


def _largest(error: Any, allowed: Any) -> float:
    if not error.size:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        fractions = np.where(error == 0, 0.0, error / allowed)
    return float(np.where(np.isnan(fractions), np.inf, fractions).max())
