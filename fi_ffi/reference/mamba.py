"""Mamba's ops from their definition."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.formula import Exact, Formula, Inputs


def seq_chunk_cumsum(a: Inputs) -> Exact:
    starts = a["chunk_indices"].astype(np.int64) * a["chunk_size"]
    starts += a["chunk_offsets"].astype(np.int64)
    if len(starts) and not 0 <= starts.min() <= starts.max() < len(a["seq_idx"]):
        raise IndexError(f"pieces start at {starts.min()} to {starts.max()}: tokens have no such")
    of_pieces = a["seq_idx"].astype(np.int64)[starts]
    sequences = np.arange(len(a["output"]))
    counts = np.searchsorted(of_pieces, sequences).astype(np.int32)
    counts[-1] = len(of_pieces)
    return {"output": (counts, None)}


EXACT: dict[str, Formula] = {"seq_chunk_cumsum": seq_chunk_cumsum}
