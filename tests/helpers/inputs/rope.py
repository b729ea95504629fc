"""Random inputs of `fi_ffi.ops.table.rope`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Call, Inputs

# Positions are below this where nothing says how many there are.
_MOST = 4096


def cosines_and_sines(positions: int, rotary_dim: int, rng: np.random.Generator) -> Array:
    """A table with a random angle for each pair at each position."""
    angles = rng.uniform(-np.pi, np.pi, (positions, rotary_dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def make(call: Call) -> None:
    """Positions; tokens dealt out to requests of any length, none among them; and a table."""
    sizes, rng = call.sizes, call.rng
    tokens, most = sizes["nnz"], _MOST
    if any(arg.name == "cos_sin_cache" for arg in call.row.args):
        most = sizes["max_seq_len"]
        size = next(axis for axis in ("rotary_dim", "rope_dim") if axis in sizes)
        call.default(cos_sin_cache=cosines_and_sines(most, sizes[size], rng))
    inner = np.sort(rng.integers(0, tokens + 1, max(sizes["b"] - 1, 0)))
    call.default(indptr=np.array([0, *inner, tokens])[: sizes["b"] + 1])
    sizes["b"] = count = len(call.tables["indptr"]) - 1
    call.default(offsets=rng.integers(0, most, count), pos_ids=rng.integers(0, most, tokens))
    call.scalars = _apart(call.scalars)


def _apart(scalars: dict[str, Any]) -> dict[str, Any]:
    """The scalars with Llama 3.1's factors on either side of 1, whatever was drawn for them."""
    low, high = scalars.get("low_freq_factor", 1.0), scalars.get("high_freq_factor", 4.0)
    apart = {"low_freq_factor": min(low, 1 / low) if low else low, "high_freq_factor": high}
    if high <= 1:
        apart["high_freq_factor"] = 1.25 + high
    return {name: apart.get(name, value) for name, value in scalars.items()}


_HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "b": 3}
_OWN = Inputs(
    small={"nnz": 6, "head_dim": 64, "rotary_dim": 64, "max_seq_len": 9, **_HEADS},
    usual={
        "nnz": 32, "num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "b": 4,
        "rotary_dim": 128, "max_seq_len": 4096,
    },
    make=make,
    variants={"in place": {"in place": True}, "interleaved": {"interleave": True}},
)  # fmt: skip
# By module, or by op.
INPUTS: dict[str, Inputs] = {"rope": _OWN}
