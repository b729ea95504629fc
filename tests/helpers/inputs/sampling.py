"""Random inputs of `fi_ffi.ops.table.sampling`: probabilities, and what filters them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Call, Inputs

# What arrays of seeds are below: formulas are given them as float64.
_MOST = 2**53


def probabilities(rng: np.random.Generator, *shape: int, spread: float = 2.0) -> Array:
    """Rows of float32 that sum to 1, a few of their elements most of it."""
    powers = np.exp(spread * rng.standard_normal(shape))
    rows: Array = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    return rows


def make(call: Call) -> None:
    """Probabilities and parameters; each output from a row of its own or from any."""
    sizes, rng, row = call.sizes, call.rng, call.row
    names, n, h = {arg.name for arg in row.args}, sizes["n"], sizes["h"]
    for axis in ("seeds", "offsets"):
        sizes.setdefault(axis, 1)
    if "r" in sizes:
        sizes["r"] = max(sizes["r"], n)
    for arg in row.tensors:
        if arg.is_scratch:
            given = {name: call.scalars[name] for name in arg.bytes_given if name in call.scalars}
            need = max(arg.bytes, arg.bytes_for(sizes | given) if arg.bytes_for else 0)
            sizes["workspace_size"] = max(need, sizes["workspace_size"])
    count = sizes.get("r", n)
    call.default(
        probs=probabilities(rng, count, h), maybe_indices=rng.integers(0, max(count, 1), n),
        maybe_top_k_arr=rng.integers(1, h + 1, count),
        maybe_top_p_arr=rng.uniform(0.05, 1, count), maybe_min_p_arr=rng.uniform(0, 1, count),
        maybe_temperature_arr=np.exp(rng.uniform(-1, 1, count)),
        maybe_seed_arr=rng.integers(0, _MOST, sizes["seeds"]),
        maybe_offset_arr=rng.integers(0, _MOST, sizes["offsets"]), valid=np.zeros(n),
    )  # fmt: skip
    if "draft_probs" in names:
        call.default(**_chain(rng, n, sizes["s"], h))
    if row.name == "top_k_mask_logits":
        call.default(logits=4 * rng.standard_normal((n, h)))
    numbers = {
        "seed_val": int(rng.integers(-(2**63), 2**63)), "offset_val": int(rng.integers(0, 2**63)),
        "philox_seed": int(rng.integers(-(2**63), 2**63)),
        "philox_offset": int(rng.integers(0, 2**63)),
        "top_k_val": int(rng.integers(1, h + 1)), "top_p_val": float(rng.uniform(0.05, 1)),
    }  # fmt: skip
    known = {name: value for name, value in numbers.items() if name in names}
    call.scalars = scalars = known | call.scalars
    if row.name == "top_k_top_p_sampling_from_probs":
        scalars["top_k_val"] = float(max(1, int(scalars["top_k_val"])))
    if row.name == "top_p_renorm_probs" and h < 2048:
        whole = "maybe_top_p_arr" in call.without
        top_p = np.full(n, scalars["top_p_val"]) if whole else call.tables["maybe_top_p_arr"]
        call.tables["probs"] = that_end(np.asarray(call.tables["probs"]), top_p, rng)


def that_end(rows: Array, top_p: Array, rng: np.random.Generator) -> Array:
    """The rows, a little different where a kernel would search for ever: docs/sampling.md."""
    while not all(of >= 1 or ends(p, of) for p, of in zip(rows, top_p, strict=True)):
        rows = rows * (1 + 1e-5 * rng.standard_normal(rows.shape))
        rows = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-9)
    return rows


def ends(p: Array, top_p: float) -> bool:
    """Whether the search for what sums to `top_p` ends, as FlashInfer 0.6.8 to 0.6.13 make it of
    rows of less than 2048: by thirds, in float32."""
    p, target = p.astype(np.float32), np.float32(top_p)
    two, three = np.float32(2), np.float32(3)
    low, high, seen = np.float32(0), p.max(initial=np.float32(0)), set()
    while (low, high) not in seen:
        seen.add((low, high))
        first, second = (high + two * low) / three, (two * high + low) / three
        least = min(high, p[p > low].min(initial=high))
        most = max(low, p[p <= high].max(initial=low))
        sums = [np.float32(p[p > pivot].sum(dtype=np.float64)) for pivot in (first, second)]
        if sums[1] >= target:
            low = second
        elif sums[0] >= target:
            low, high = first, min(second, most)
        else:
            high = min(first, most)
        if least == most:
            return True
    return False


def _chain(rng: np.random.Generator, n: int, s: int, h: int) -> dict[str, Array]:
    """Drafts that are often near enough to the target to be taken."""
    target = probabilities(rng, n, s + 1, h)
    near = target[:, :s] * np.exp(0.5 * rng.standard_normal((n, s, h)))
    draft = (near / near.sum(axis=2, keepdims=True)).astype(np.float32)
    ends = np.cumsum(draft, axis=2)
    ids = (ends < rng.uniform(0, 1, (n, s, 1)) * ends[:, :, -1:]).sum(axis=2)
    return {
        "target_probs": target,
        "draft_probs": draft,
        "draft_token_ids": np.minimum(ids, h - 1),
        "output_accepted_token_num": rng.integers(0, 100, n),
        "output_emitted_draft_token_num": rng.integers(0, 100, n),
    }


_SEEDS = ("maybe_seed_arr", "maybe_offset_arr")
_ARRAYS = ("maybe_top_k_arr", "maybe_top_p_arr", "maybe_min_p_arr", "maybe_temperature_arr")
_SCRATCH = ("workspace_buffer", "workspace", "row_states_buffer")
_VARIANTS: dict[str, Mapping[str, Any]] = {
    "numbers": {"without": (*_SEEDS, *_ARRAYS, "maybe_indices")},
    "own rows": {"without": ("maybe_indices",)},
}
_SAMPLERS = Inputs(
    small={"n": 4, "r": 5, "h": 24},
    usual={"n": 32, "r": 32, "h": 4096},
    make=make,
    variants=_VARIANTS,
)
_WHOLE_ROWS = Inputs(
    small={"n": 4, "h": 24, "workspace_size": 2**20},
    usual={"n": 32, "h": 4096, "workspace_size": 2**20},
    make=make,
    variants={
        "numbers": {"without": _ARRAYS},
        "own scratch": {"without": (*_ARRAYS, *_SCRATCH)},
        "in place": {"in place": True},
    },
)
_CHAIN = Inputs(
    small={"n": 4, "s": 3, "h": 24},
    usual={"n": 32, "s": 5, "h": 4096},
    make=make,
    variants={"numbers": {"without": _SEEDS}},
)
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "sampling": _SAMPLERS,
    "softmax": _WHOLE_ROWS,
    "top_p_renorm_probs": _WHOLE_ROWS,
    "top_k_renorm_probs": _WHOLE_ROWS,
    "top_k_mask_logits": _WHOLE_ROWS,
    "chain_speculative_sampling": _CHAIN,
}
