"""Ops of `fi_ffi.ops.table.rope` in float64, from their definition.

A pair of elements is a complex number, which a position turns by an angle.
"""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs

# The error of an angle from `__powf` and `__sincosf`, and the same again for each bit of the
# power's exponent (CUDA's programming guide on -use_fast_math).
_ANGLE = 2.0**-21


def turned(
    x: Array, turn: Array, interleave: bool, angle_error: Array | float = 0.0
) -> tuple[Array, Array]:
    """Turn the first pairs of heads by `turn` [tokens, pairs]; return also the magnitude of errors.

    The other elements are copied, without error.
    """
    pairs = turn.shape[-1]
    step = 2 if interleave else 1
    first = np.arange(pairs) * step
    second = first + (1 if interleave else pairs)
    product = (x[..., first] + 1j * x[..., second]) * turn[:, None]
    value, magnitude = x.copy(), np.zeros_like(x)
    value[..., first], value[..., second] = product.real, product.imag
    error = np.broadcast_to(1 + np.asarray(angle_error) / SLACK, turn.shape)[:, None]
    size = (np.abs(x[..., first]) + np.abs(x[..., second])) * np.abs(turn)[:, None]
    magnitude[..., first] = magnitude[..., second] = size * error
    return value, magnitude


def _both(
    a: Inputs, turn: Array, angle_error: Array | float = 0.0
) -> dict[str, tuple[Array, Array]]:
    return {
        f"{name}_rope": turned(a[name], turn, a["interleave"], angle_error) for name in ("q", "k")
    }


def _rotary_dim(a: Inputs) -> int:
    rotary_dim = a["rotary_dim"]
    return int(a["q"].shape[-1]) if rotary_dim is None else int(rotary_dim)


def _frequencies(a: Inputs) -> tuple[Array, Array]:
    """Return each pair's frequency in radians, and the weight of an error in computing it."""
    pair = np.arange(_rotary_dim(a) // 2)
    own = np.exp(-np.log(a["rope_theta"]) * 2 * pair / max(_rotary_dim(a), 1))
    scaled = own / a["rope_scale"]
    bits = 1 + np.abs(np.log2(own))
    if "low_freq_factor" not in a:
        return scaled, scaled * bits * _ANGLE
    low, high = a["low_freq_factor"], a["high_freq_factor"]
    # The waves of a pair that fit into the old context. Above `high` a pair keeps its frequency,
    # below `low` the frequency is scaled, and in between it is interpolated.
    waves = a["old_context_length"] * own / (2 * np.pi)
    between = (waves - low) / (high - low)
    mixed = (1 - between) * scaled + between * own
    frequency = np.where(waves > high, own, np.where(waves < low, scaled, mixed))
    slope = np.where((waves > high) | (waves < low), 0, waves / (high - low))
    worth = frequency + slope * np.abs(own - scaled)
    return frequency, worth * bits * _ANGLE


def _turned_by(a: Inputs, positions: Array) -> dict[str, tuple[Array, Array]]:
    frequency, error = _frequencies(a)
    return _both(a, np.exp(1j * positions[:, None] * frequency), np.abs(positions)[:, None] * error)


def apply_rope(a: Inputs) -> Exact:
    """Turn the tokens of requests; other tokens stay unchanged."""
    ends = a["indptr"].astype(int)
    positions = np.zeros(ends[-1])
    for start, end, offset in zip(ends, ends[1:], a["offsets"], strict=False):
        positions[start:end] = offset + np.arange(end - start)
    of_requests = a | {name: a[name][: ends[-1]] for name in "qk"}
    results = {}
    for name, (value, magnitude) in _turned_by(of_requests, positions).items():
        rest = a[name][ends[-1] :]
        results[name] = (
            np.concatenate([value, rest]),
            np.concatenate([magnitude, np.zeros_like(rest)]),
        )
    return results


def apply_rope_pos_ids(a: Inputs) -> Exact:
    return _turned_by(a, a["pos_ids"])


def table(a: Inputs) -> Array:
    """Return the factors of each token's pairs, from the table."""
    rows = a["cos_sin_cache"][a["pos_ids"].astype(int)]
    cos, sin = np.split(rows, 2, axis=1)
    turn: Array = cos + 1j * sin
    return turn


def apply_rope_pos_ids_cos_sin_cache(a: Inputs) -> Exact:
    return _both(a, table(a))


EXACT: dict[str, Formula] = {
    "apply_rope": apply_rope,
    "apply_llama31_rope": apply_rope,
    "apply_rope_pos_ids": apply_rope_pos_ids,
    "apply_llama31_rope_pos_ids": apply_rope_pos_ids,
    "apply_rope_pos_ids_cos_sin_cache": apply_rope_pos_ids_cos_sin_cache,
}
