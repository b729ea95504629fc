"""Where sequences' pieces start: the entry of FlashInfer's `mamba_seq_chunk_cumsum` module.

The kernels (`include/flashinfer/mamba/seq_chunk_cumsum.cuh`) search the pieces' sequences, which
they take to be sorted, and read `seq_idx` wherever a piece says that it starts.
`selective_state_update` is in `fi_ffi.ops.mamba`: its module's name has what it is called with.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.row import Row, Rule, Scalar, Tensor, Vector

_INT = 2**31 - 1
_PIECE: dict[str, Any] = {"dtype": "int32", "contiguous": True}
# Sequences that one block searches for: more need memory in which blocks add up.
ONE_BLOCK = 1023
_TILE, _WARP = 256, 32


def tile_state_bytes(num_seqs: int) -> int:
    """What `cub::ScanTileState<int32_t>` keeps: 8 bytes for each tile of sequences, after as many
    as a warp looks back at."""
    return 8 * (_WARP + -(-num_seqs // _TILE)) if num_seqs > ONE_BLOCK else 0


ROWS = (
    Row(
        "seq_chunk_cumsum",
        "mamba_seq_chunk_cumsum",
        "seq_chunk_cumsum",
        "csrc/seq_chunk_cumsum_jit_binding.cu",
        "Count the pieces that chunks of tokens are cut into where a sequence ends: how many come "
        "before each sequence's, and how many there are.",
        (
            Tensor("seq_idx", "tokens", "I", "each token's sequence, rising", contiguous=True),
            Tensor("chunk_indices", "num_logical_chunks", doc="the chunk of each piece, in order: "
                   "its first token is `chunk_indices * chunk_size + chunk_offsets`, and is not "
                   "looked at before the launch", **_PIECE),
            Tensor("chunk_offsets", "num_logical_chunks", doc="where in it the piece starts",
                   **_PIECE),
            Tensor("output", "num_seqs+1", writes=True, reads=False,
                   doc="how many pieces come before those of each sequence, and all", **_PIECE),
            Tensor("tile_state", "bytes", "uint8", "scratch for more than 1023 sequences; without "
                   "it each stream has its own of fi_ffi's", writes=True, reads=False,
                   contiguous=True, optional=True, alignment=8,
                   bytes_for=lambda sizes: tile_state_bytes(sizes["num_seqs"])),
            Scalar("chunk_size", int, None, "tokens of a chunk", low=1, high=_INT),
            Scalar("num_logical_chunks", int, None, "how many pieces there are", low=0, high=_INT,
                   size_of="num_logical_chunks"),
            Scalar("num_seqs", int, None, "how many sequences there are", low=0, high=_INT,
                   size_of="num_seqs"),
        ),
        {"I": ("int32", "int64")},
        ">=0.6.7",
        vector=Vector(()),
        offset_limit=2**63,
        requires=(
            f"num_logical_chunks <= {_INT}",
            f"num_seqs <= {_INT - 1024}",
            Rule("chunk_indices", "tokens >= 1 or num_logical_chunks == 0",
                 "no pieces, where there are no tokens"),
        ),
    ),
)  # fmt: skip
