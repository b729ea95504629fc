"""Random sequences of tokens, in chunks, and the pieces of each."""

from __future__ import annotations

import numpy as np

from tests.helpers.inputs.family import Call, Inputs


def pieces(lengths: np.ndarray, chunk_size: int) -> dict[str, np.ndarray]:
    """Each token's sequence, and where the parts of a sequence in a chunk start."""
    of_token = np.repeat(np.arange(len(lengths)), lengths)
    is_first = (np.arange(len(of_token)) % chunk_size == 0) | (np.diff(of_token, prepend=-1) != 0)
    starts = np.flatnonzero(is_first)
    return {
        "seq_idx": of_token,
        "chunk_indices": starts // chunk_size,
        "chunk_offsets": starts % chunk_size,
    }


def make(call: Call) -> None:
    """Sequences of which some have no token."""
    sizes, rng = call.sizes, call.rng
    size = call.scalars.setdefault("chunk_size", 64)
    count = sizes["num_seqs"]
    lengths = rng.integers(0, 150, count) * rng.integers(0, 3, count)
    call.default(**pieces(lengths, size))
    sizes["tokens"] = len(call.tables["seq_idx"])
    sizes["num_logical_chunks"] = len(call.tables["chunk_indices"])


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "mamba_seq_chunk_cumsum": Inputs(
        small={"num_seqs": 6, "bytes": 4096},
        usual={"num_seqs": 3000, "bytes": 4096},
        make=make,
        variants={"own scratch": {"without": ("tile_state",)}},
    )
}
