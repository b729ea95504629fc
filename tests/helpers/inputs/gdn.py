"""Random inputs of the gated delta rule's prefill."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.ops.on_host import checkpoint_cu_starts
from fi_ffi.ops.row import Row
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Inputs, Made


def make(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """Inputs of the gated delta rule, its sizes, and its scalars.

    Keys and queries are of length 1, gates from 0 to 1, and the state before has columns of
    length 1, as what a layer hands on has.
    """
    tokens, heads, size = sizes["total_seq_len"], sizes["num_v_heads"], sizes["head_size"]
    of_q = sizes["num_q_heads"]
    sizes = {**sizes, "num_sab_heads": max(of_q, heads), "num_k_heads": min(of_q, heads)}
    made = dict(tables or {})
    if "cu_seqlens" not in made:
        inner = rng.choice(np.arange(1, tokens), sizes["num_seqs"] - 1, replace=False)
        made["cu_seqlens"] = np.array([0, *sorted(inner), tokens])
    sizes["num_seqs"] = count = len(made["cu_seqlens"]) - 1

    def unit(*shape: int) -> Array:
        values: Array = rng.standard_normal(shape)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
        return values

    made.setdefault("q", unit(tokens, of_q, size))
    made.setdefault("k", unit(tokens, sizes["num_k_heads"], size))
    made.setdefault("input_state", unit(count, sizes["num_sab_heads"], size, size))
    made.setdefault("alpha", rng.uniform(0.7, 1, (tokens, sizes["num_sab_heads"])))
    made.setdefault("beta", rng.uniform(0, 1, (tokens, sizes["num_sab_heads"])))
    every = scalars.get("checkpoint_every_n_tokens", 64 * ("state_checkpoints" not in without))
    if any(arg.name == "checkpoint_every_n_tokens" for arg in row.args):
        scalars = scalars | {"checkpoint_every_n_tokens": every}
    if every:
        made["checkpoint_cu_starts"] = checkpoint_cu_starts(made["cu_seqlens"], every)
        sizes["total_checkpoints"] = int(made["checkpoint_cu_starts"][-1])
    return made, sizes, scalars


_CHECKPOINTS = ("state_checkpoints", "checkpoint_cu_starts")
_HEADS = {"num_q_heads": 2, "num_v_heads": 4, "head_size": 128}
_OWN = Inputs(
    small={"total_seq_len": 70, "num_seqs": 2, "workspace_size": 2**16, **_HEADS},
    usual={"total_seq_len": 32, "num_seqs": 4, "workspace_size": 2**16, **_HEADS},
    make=make,
    variants={
        "no checkpoints": {"without": _CHECKPOINTS},
        "no state": {"without": ("input_state", *_CHECKPOINTS)},
        "own scratch": {"without": ("alpha", "beta", "workspace_buffer")},
        "in place": {"in place": True},
    },
)
# By module, or by op.
INPUTS = {"gdn_prefill_sm90": _OWN}
