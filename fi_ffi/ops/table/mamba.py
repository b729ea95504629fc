"""Start of the sequences' pieces: the entry of FlashInfer's `mamba_seq_chunk_cumsum` module.

The kernels (`include/flashinfer/mamba/seq_chunk_cumsum.cuh`) search the pieces' sequences, assuming
that they are sorted, and read `seq_idx` at the start of each piece without a check.
`selective_state_update` is in `fi_ffi.ops.states.mamba`: its module depends on its arguments.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, Vector

_PIECE: dict[str, Any] = {"dtype": "int32", "contiguous": True}
# The most sequences for one block; more need memory for a sum across blocks.
ONE_BLOCK = 1023
_TILE, _WARP = 256, 32


def tile_state_bytes(num_seqs: int) -> int:
    """Return the bytes of `cub::ScanTileState<int32_t>`: 8 for each tile of sequences, and 8 for
    each thread of the warp that looks back."""
    return 8 * (_WARP + -(-num_seqs // _TILE)) if num_seqs > ONE_BLOCK else 0


ROWS = (
    Row(
        "seq_chunk_cumsum",
        "mamba_seq_chunk_cumsum",
        "seq_chunk_cumsum",
        "csrc/seq_chunk_cumsum_jit_binding.cu",
        "Count the pieces of chunks. A chunk of tokens is cut where a sequence ends; the result is "
        "the number of pieces before each sequence, and of all pieces.",
        (
            Tensor(
                "seq_idx",
                "tokens",
                "I",
                "each token's sequence, in rising order",
                contiguous=True,
                no_index="only compared",
            ),
            Tensor(
                "chunk_indices",
                "num_logical_chunks",
                doc="chunk of each piece, in order: its first token is `chunk_indices * "
                "chunk_size + chunk_offsets`",
                index=(
                    "0 <= chunk_indices",
                    "chunk_indices * chunk_size < tokens",
                ),
                **_PIECE,
            ),
            Tensor(
                "chunk_offsets",
                "num_logical_chunks",
                doc="start of the piece in its chunk",
                index=(
                    "0 <= chunk_offsets < chunk_size",
                    "chunk_indices * chunk_size + chunk_offsets < tokens",
                ),
                **_PIECE,
            ),
            Tensor(
                "output",
                "num_seqs+1",
                writes=True,
                reads=False,
                doc="number of pieces before each sequence, then of all pieces",
                **_PIECE,
            ),
            Tensor(
                "tile_state",
                "bytes",
                "uint8",
                "scratch for more than 1023 sequences; by default fi_ffi keeps one for each stream",
                writes=True,
                reads=False,
                contiguous=True,
                optional=True,
                alignment=8,
                bytes_for=lambda sizes: tile_state_bytes(sizes["num_seqs"]),
            ),
            Scalar("chunk_size", int, None, "tokens in a chunk", low=1, high=INT32_MAX),
            Scalar(
                "num_logical_chunks",
                int,
                None,
                "number of pieces",
                low=0,
                high=INT32_MAX,
                size_of="num_logical_chunks",
            ),
            Scalar(
                "num_seqs",
                int,
                None,
                "number of sequences",
                low=0,
                high=INT32_MAX,
                size_of="num_seqs",
            ),
        ),
        {"I": ("int32", "int64")},
        ">=0.6.7",
        vector=Vector(()),
        offset_limit=2**63,
        requires=(
            f"num_logical_chunks <= {INT32_MAX}",
            f"num_seqs <= {INT32_MAX - 1024}",
            Rule("chunk_indices", "tokens >= 1 or num_logical_chunks == 0", "0 without tokens"),
        ),
    ),
)
