"""Rotary position embeddings: entries of FlashInfer's `rope` module.

The rows' requirements beyond the binding's own checks follow the kernels in
`include/flashinfer/pos_enc.cuh`. A thread loads 16 bytes of q and k at a time (16 elements if it
quantises), and rotates all of its vector or none. Half a rotary part away is another thread's
vector, unless `interleave` is set. The grid's second dimension counts heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.notation import ceil_div
from fi_ffi.ops.call.row import IN_PLACE, Absent, KvLayout, Row, Rule, Scalar, Tensor, Vector

SOURCE = "csrc/flashinfer_rope_binding.cu"
INPUTS: dict[str, tuple[str, ...]] = {"T": ("float16", "bfloat16")}
INDEX: dict[str, tuple[str, ...]] = {"I": ("int32", "int64")}
# Head sizes with kernels of their own. `apply_rope_pos_ids_cos_sin_cache` sends others to the
# quantising kernel, with an output of the input's dtype.
_HEAD_DIMS = (64, 128, 256, 512)
WIDE = 16  # elements of a thread of the quantising kernel
MOST_BLOCKS = 2**16 - 1  # the limit of a grid's second dimension
MOST = f"nnz <= {INT32_MAX}"
MOST_THREADS = 1024


def _has_whole_vectors(rotary_dim: int, head_dim: int, interleave: bool) -> bool:
    """Whether each thread rotates all of its vector or none, with the partners in one vector."""
    vector = max(8, head_dim // 32) if head_dim in _HEAD_DIMS else WIDE
    return rotary_dim % (vector if interleave else 2 * vector) == 0


def chunks(rope_dim: int, no_rope_dim: int) -> int:
    """Return the pieces of a head for which the quantising kernel has blocks."""
    return 1 + ceil_div(no_rope_dim, rope_dim)


def _fits_grid(q_heads: int, kv_heads: int, rotary_dim: int, head_dim: int) -> bool:
    pieces = 1 if head_dim in _HEAD_DIMS else chunks(rotary_dim, head_dim - rotary_dim)
    return (q_heads + kv_heads) * pieces <= MOST_BLOCKS


def _reads_before_it_writes(
    in_place: bool, interleave: bool, rotary_dim: int, head_dim: int
) -> bool:
    """Whether partners belong to one warp, which reads both before it writes either."""
    alone = not in_place or interleave or head_dim in _HEAD_DIMS
    return alone or 32 % (rotary_dim // WIDE) == 0


_HAS_WHOLE_VECTORS = "has_whole_vectors(rotary_dim, head_dim, interleave)"
_WHOLE_VECTORS = Rule(
    "rotary_dim",
    _HAS_WHOLE_VECTORS,
    "a multiple of 8 (of 16 where head_dim is 512) with interleave, and of twice that without",
    {"has_whole_vectors": _has_whole_vectors},
)
_HEAD = "nnz num_qo_heads head_dim", "nnz num_kv_heads head_dim"
_IN = (
    Tensor("q", _HEAD[0], "T", "queries; may be slices of a fused buffer"),
    Tensor("k", _HEAD[1], "T", "keys; without heads, only q is rotated"),
    Tensor("q_rope", _HEAD[0], "T", "rotated q; may be q itself", writes=True, reads=False),
    Tensor("k_rope", _HEAD[1], "T", "rotated k; may be k itself", writes=True, reads=False),
)
_FACTOR = "a factor of the angle"
_RAGGED = (
    Tensor(
        "indptr",
        "b+1",
        "I",
        contiguous=True,
        doc="start of each request's tokens, and the end; tokens past the end are left out",
        index=("0 <= indptr <= nnz", "0 <= steps(indptr)", "indptr[0] <= 0"),
    ),
    Tensor(
        "offsets",
        "b",
        "I",
        "position of each request's first token",
        contiguous=True,
        no_index=_FACTOR,
    ),
)
_POS_IDS = Tensor("pos_ids", "nnz", "I", "position of each token", contiguous=True)
POS_IDS = replace(_POS_IDS, index=("0 <= pos_ids < max_seq_len",))  # of the tables' rows
INTERLEAVE = Scalar(
    "interleave",
    bool,
    False,
    "True: rotate elements 2i and 2i+1 (GPT-J); False: i and i + rotary_dim / 2 (GPT-NeoX, Llama)",
)
# The least value that is not taken for a mistake: the kernels divide by it in float32.
_LEAST = 1e-6
_ANGLE = (
    Scalar(
        "rotary_dim",
        int,
        None,
        "number of elements of a head that are rotated, from the first",
        low=0,
        size_of="head_dim",
        or_less=True,
    ),
    INTERLEAVE,
    Scalar("rope_scale", float, 1.0, "divisor of positions", low=_LEAST),
    Scalar(
        "rope_theta",
        float,
        1e4,
        "pair i turns by position * theta ** (-2i / rotary_dim)",
        low=_LEAST,
    ),
)
_ANGLE_31 = (
    *_ANGLE[:2],
    Scalar("rope_scale", float, 8.0, "divisor of the positions of long waves", low=_LEAST),
    replace(_ANGLE[3], default=5e5),
    Scalar(
        "low_freq_factor",
        float,
        1.0,
        low=0.0,
        doc="waves longer than old_context_length / low_freq_factor are scaled in full",
    ),
    Scalar(
        "high_freq_factor",
        float,
        4.0,
        low=0.0,
        doc="waves shorter than old_context_length / high_freq_factor are not scaled",
    ),
    Scalar(
        "old_context_length", float, 8192.0, low=0.0, doc="context length of the first training"
    ),
)
_FACTORS = Rule(
    "high_freq_factor", "high_freq_factor > low_freq_factor", "more than low_freq_factor"
)
_ROPE = "Rotate q and k by their positions, the angles computed in the kernel"
_ROPE_31 = f"{_ROPE}, as Llama 3.1 scales them"


def row(
    name: str,
    doc: str,
    *args: Tensor | Scalar | Absent | KvLayout,
    requires: tuple[str | Rule, ...],
    **more: Any,
) -> Row:
    fields: dict[str, Any] = {
        "symbol": name,
        "dtypes": INPUTS | INDEX,
        "vector": Vector(("head_dim",), dtype="T"),
        "requires": ("num_qo_heads >= 1", MOST, *requires),
        "nothing_axis": "nnz",
        "in_place": (("q_rope", "q"), ("k_rope", "k")),
    } | more
    return Row(
        name,
        "rope",
        source=SOURCE,
        doc=doc,
        args=args,
        releases=">=0.6.3",
        offset_limit=2**63,
        **fields,
    )


def _ragged(name: str, doc: str, angle: tuple[Scalar, ...], *rules: Rule) -> Row:
    # b * (num_qo_heads + num_kv_heads) blocks are in one dimension of a grid.
    most = (f"b * {heads} <= {2**30 - 1}" for heads in ("num_qo_heads", "num_kv_heads"))
    return row(
        name,
        f"{doc}; a request's tokens have positions one after another.",
        *_IN,
        *_RAGGED,
        *angle,
        requires=(f"head_dim in {_HEAD_DIMS}", "nnz == 0 or b >= 1", *most, _WHOLE_VECTORS, *rules),
    )


def _positioned(name: str, doc: str, angle: tuple[Scalar, ...], *rules: Rule) -> Row:
    most = (f"{heads} <= {MOST_BLOCKS // 2}" for heads in ("num_qo_heads", "num_kv_heads"))
    return row(
        name,
        f"{doc}; each token has a position of its own.",
        *_IN,
        replace(_POS_IDS, no_index=_FACTOR),
        *angle,
        requires=(f"head_dim in {_HEAD_DIMS}", *most, _WHOLE_VECTORS, *rules),
    )


def cos_sin_cache(rotary_dim: str) -> Tensor:
    return Tensor(
        "cos_sin_cache",
        f"max_seq_len {rotary_dim}",
        "float32",
        contiguous=True,
        alignment=16,
        # With int32 positions, the kernel counts the table's elements in 32 bits.
        offset_limit=2**32,
        doc="for each position, the cosines of all pairs, then their sines; with interleave, the "
        "kernel reads up to 32 bytes past a row",
    )


_COS_SIN = row(
    "apply_rope_pos_ids_cos_sin_cache",
    "Rotate q and k by their positions, with cosines and sines from a table.",
    *_IN,
    cos_sin_cache("rotary_dim"),
    POS_IDS,
    INTERLEAVE,
    requires=(
        "rotary_dim >= 1",
        "head_dim % 8 == 0",
        "head_dim >= rotary_dim",
        "nnz == 0 or max_seq_len >= 1",
        f"rotary_dim <= {WIDE * MOST_THREADS}",
        Rule(
            "cos_sin_cache",
            _HAS_WHOLE_VECTORS,
            "of a rotary_dim that with interleave is a multiple of 16, or of 8 where head_dim is "
            "64, 128 or 256; and of twice that without",
            _WHOLE_VECTORS.using,
        ),
        Rule(
            "q",
            "fits_grid(num_qo_heads, num_kv_heads, rotary_dim, head_dim)",
            "of heads so few that (num_qo_heads + num_kv_heads) * (head_dim / rotary_dim, rounded "
            f"up) is at most {MOST_BLOCKS}",
            {"fits_grid": _fits_grid},
        ),
        Rule(
            "q_rope",
            f"reads_first({IN_PLACE}, interleave, rotary_dim, head_dim)",
            "other memory than q (and k_rope than k), unless interleave is set, or head_dim is 64, "
            "128, 256 or 512, or rotary_dim is 32, 64, 128, 256 or 512: otherwise a warp may "
            "overwrite input of another warp",
            {"reads_first": _reads_before_it_writes},
        ),
    ),
)


ROWS = (
    _ragged("apply_rope", _ROPE, _ANGLE),
    _ragged("apply_llama31_rope", _ROPE_31, _ANGLE_31, _FACTORS),
    _positioned("apply_rope_pos_ids", _ROPE, _ANGLE),
    _positioned("apply_llama31_rope_pos_ids", _ROPE_31, _ANGLE_31, _FACTORS),
    _COS_SIN,
)
