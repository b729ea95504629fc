"""Random inputs of `fi_ffi.ops.table.topk`: rows, and the parts of them to choose from."""

from __future__ import annotations

import numpy as np

from tests.helpers.inputs.family import Call, Inputs

# Floats that a block has room for on an H100: page tables of longer rows are deterministic.
ROOM = 57592


def make(call: Call) -> None:
    """Rows with ties, of which some parts are shorter than what is chosen."""
    sizes, rng, scalars = call.sizes, call.rng, call.scalars
    n, d = sizes["n"], sizes["d"]
    sizes |= {"b": sizes.get("b", n), "m": sizes.get("m", d)}
    lengths = rng.integers(0, d + 1, n)
    starts = rng.integers(0, d - lengths + 1)
    call.default(
        input=np.round(rng.standard_normal((n, d)), 2), lengths=lengths, maybe_row_starts=starts,
        maybe_page_table_row_starts=starts, offsets=rng.integers(0, 2**20, n),
        maybe_row_to_batch=rng.integers(0, max(sizes["b"], 1), n),
        src_page_table=rng.integers(0, 2**20, (sizes["b"], sizes["m"])),
    )  # fmt: skip
    if any(arg.name == "top_k" for arg in call.row.args):
        scalars.setdefault("top_k", sizes["top_k"])
    is_ordered = scalars.get("tie_break") or scalars.get("dsa_graph_safe")
    if call.row.name == "radix_topk_page_table_transform" and d > ROOM and not is_ordered:
        scalars.setdefault("deterministic", True)


_STARTS = ("maybe_row_starts", "maybe_page_table_row_starts")
_OPTIONAL = (*_STARTS, "maybe_row_to_batch", "maybe_row_states_buffer", "maybe_output_raw_indices")
_INPUTS = Inputs(
    small={"n": 4, "d": 24, "top_k": 5, "workspace_size": 2**20},
    usual={"n": 32, "d": 4096, "top_k": 64, "workspace_size": 2**20},
    make=make,
    variants={
        "nothing else": {"without": _OPTIONAL},
        "ties": {"tie_break": 2, "without": _STARTS},
    },
)
# By module, or by op.
INPUTS: dict[str, Inputs] = {"topk": _INPUTS}
