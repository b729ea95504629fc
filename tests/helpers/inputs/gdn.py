"""Random inputs of the gated delta rule's prefill."""

from __future__ import annotations

import numpy as np

from fi_ffi.ops.on_host import checkpoint_cu_starts
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Call, Inputs


def make(call: Call) -> None:
    """Inputs of the gated delta rule, its sizes, and its scalars.

    Keys and queries are of length 1, gates from 0 to 1, and the state before has columns of
    length 1, as what a layer hands on has.
    """
    sizes, rng = call.sizes, call.rng
    tokens, heads, size = sizes["total_seq_len"], sizes["num_v_heads"], sizes["head_size"]
    of_q = sizes["num_q_heads"]
    sizes |= {"num_sab_heads": max(of_q, heads), "num_k_heads": min(of_q, heads)}
    if "cu_seqlens" not in call.tables:
        inner = rng.choice(np.arange(1, tokens), sizes["num_seqs"] - 1, replace=False)
        call.tables["cu_seqlens"] = np.array([0, *sorted(inner), tokens])
    sizes["num_seqs"] = count = len(call.tables["cu_seqlens"]) - 1
    slots = sizes.setdefault("slots", count)
    if any(arg.name == "state_indices" for arg in call.row.args):
        call.tables.setdefault("state_indices", rng.permutation(slots)[:count])

    def unit(*shape: int) -> Array:
        values: Array = rng.standard_normal(shape)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
        return values

    call.default(
        q=unit(tokens, of_q, size), k=unit(tokens, sizes["num_k_heads"], size),
        input_state=unit(slots, sizes["num_sab_heads"], size, size),
        alpha=rng.uniform(0.7, 1, (tokens, sizes["num_sab_heads"])),
        beta=rng.uniform(0, 1, (tokens, sizes["num_sab_heads"])),
    )  # fmt: skip
    name = "checkpoint_every_n_tokens"
    every = call.scalars.get(name, 64 * ("state_checkpoints" not in call.without))
    if any(arg.name == name for arg in call.row.args):
        call.scalars[name] = every
    if every:
        starts = checkpoint_cu_starts(call.tables["cu_seqlens"], every)
        if call.row.variant:  # of whole pieces only
            whole = np.diff(call.tables["cu_seqlens"]) // every
            starts = np.concatenate([[0], np.cumsum(whole)])
        call.tables["checkpoint_cu_starts"] = starts
        sizes["total_checkpoints"] = int(starts[-1])


_CHECKPOINTS = ("state_checkpoints", "checkpoint_cu_starts")
_HEADS = {"num_q_heads": 2, "num_v_heads": 4, "head_size": 128}
_OWN = Inputs(
    small={"total_seq_len": 130, "num_seqs": 2, "workspace_size": 2**16, **_HEADS},
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
