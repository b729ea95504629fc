"""Rotary position embeddings: entries of FlashInfer's `rope` module.

What the rows demand beyond the binding's own checks follows the kernels in
`include/flashinfer/pos_enc.cuh`: a thread loads 16 bytes of q and k at a time, 16 elements where
it quantises, and all of its vector is rotated or none of it; half the rotary part is another
thread's vector unless `interleave` is set.  Blocks stand for heads in the grid's second dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.notation import ceil_div
from fi_ffi.ops.row import IN_PLACE, Absent, KvLayout, Row, Rule, Scalar, Tensor, Vector

SOURCE = "csrc/flashinfer_rope_binding.cu"
INPUTS: dict[str, tuple[str, ...]] = {"T": ("float16", "bfloat16")}
INDEX: dict[str, tuple[str, ...]] = {"I": ("int32", "int64")}
# Head sizes that kernels of their own were compiled for; others of `apply_rope_pos_ids_cos_sin_
# cache` go to the kernel that quantises, with an output that is as wide as the input.
_HEAD_DIMS = (64, 128, 256, 512)
WIDE = 16  # elements that a thread of the quantising kernel has
MOST_BLOCKS = 2**16 - 1  # of a grid's second dimension
MOST = f"nnz <= {2**31 - 1}"
MOST_THREADS = 1024


def _has_whole_vectors(rotary_dim: int, head_dim: int, interleave: bool) -> bool:
    """Whether each thread rotates all or nothing, and has its partners in one vector."""
    vector = max(8, head_dim // 32) if head_dim in _HEAD_DIMS else WIDE
    return rotary_dim % (vector if interleave else 2 * vector) == 0


def chunks(rope_dim: int, no_rope_dim: int) -> int:
    """The pieces of a head that the quantising kernel has blocks for."""
    return 1 + ceil_div(no_rope_dim, rope_dim)


def _fits_grid(q_heads: int, kv_heads: int, rotary_dim: int, head_dim: int) -> bool:
    pieces = 1 if head_dim in _HEAD_DIMS else chunks(rotary_dim, head_dim - rotary_dim)
    return (q_heads + kv_heads) * pieces <= MOST_BLOCKS


def _reads_before_it_writes(
    in_place: bool, interleave: bool, rotary_dim: int, head_dim: int
) -> bool:
    """Whether partners are of one warp, which has read both before it writes either."""
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
    Tensor("q", _HEAD[0], "T", "queries, also as slices of a fused buffer"),
    Tensor("k", _HEAD[1], "T", "keys; of no heads where there is nothing to do"),
    Tensor("q_rope", _HEAD[0], "T", "q with its positions; may be q itself",
           writes=True, reads=False),
    Tensor("k_rope", _HEAD[1], "T", "k with its positions; may be k itself",
           writes=True, reads=False),
)  # fmt: skip
_RAGGED = (
    Tensor("indptr", "b+1", "I", contiguous=True,
           doc="where each request's tokens start, and the end of the last one's; tokens past "
               "the end are left out"),
    Tensor("offsets", "b", "I", "the position of each request's first token", contiguous=True),
)  # fmt: skip
POS_IDS = Tensor("pos_ids", "nnz", "I", "the position of each token", contiguous=True)
INTERLEAVE = Scalar(
    "interleave", bool, False,
    "rotate elements 2i and 2i+1 (GPT-J); without it i and i + rotary_dim / 2 (GPT-NeoX, Llama)",
)  # fmt: skip
# Less than this is taken for a mistake: the kernels divide by them in float32.
_LEAST = 1e-6
_ANGLE = (
    Scalar("rotary_dim", int, None, "how many of a head's elements are rotated, from the first",
           low=0, size_of="head_dim", or_less=True),
    INTERLEAVE,
    Scalar("rope_scale", float, 1.0, "positions are divided by it", low=_LEAST),
    Scalar("rope_theta", float, 1e4, "pair i turns by position * theta ** (-2i / rotary_dim)",
           low=_LEAST),
)  # fmt: skip
_ANGLE_31 = (
    *_ANGLE[:2],
    Scalar("rope_scale", float, 8.0, "positions of long waves are divided by it", low=_LEAST),
    replace(_ANGLE[3], default=5e5),
    Scalar("low_freq_factor", float, 1.0, low=0.0,
           doc="waves longer than old_context_length / low_freq_factor are scaled in full"),
    Scalar("high_freq_factor", float, 4.0, low=0.0,
           doc="waves shorter than old_context_length / high_freq_factor are not scaled"),
    Scalar("old_context_length", float, 8192.0, low=0.0,
           doc="the context that the model was trained on first"),
)  # fmt: skip
_FACTORS = Rule(
    "high_freq_factor", "high_freq_factor > low_freq_factor", "more than low_freq_factor",
)  # fmt: skip
_ROPE = "Rotate q and k by their positions, the angles computed in the kernel"
_ROPE_31 = f"{_ROPE}, as Llama 3.1 scales them"


def row(
    name: str, doc: str, *args: Tensor | Scalar | Absent | KvLayout,
    requires: tuple[str | Rule, ...], **more: Any,
) -> Row:  # fmt: skip
    fields: dict[str, Any] = {
        "symbol": name, "dtypes": INPUTS | INDEX, "vector": Vector(("head_dim",), dtype="T"),
        "requires": ("num_qo_heads >= 1", MOST, *requires), "nothing_axis": "nnz",
        "in_place": (("q_rope", "q"), ("k_rope", "k")),
    } | more  # fmt: skip
    return Row(
        name, "rope", source=SOURCE, doc=doc, args=args, releases=">=0.6.3", offset_limit=2**63,
        **fields,
    )  # fmt: skip


def _ragged(name: str, doc: str, angle: tuple[Scalar, ...], *rules: Rule) -> Row:
    # One dimension of blocks for b * (num_qo_heads + num_kv_heads).
    most = (f"b * {heads} <= {2**30 - 1}" for heads in ("num_qo_heads", "num_kv_heads"))
    return row(
        name, f"{doc}; a request's tokens have positions one after another.",
        *_IN, *_RAGGED, *angle,
        requires=(f"head_dim in {_HEAD_DIMS}", "nnz == 0 or b >= 1", *most, _WHOLE_VECTORS, *rules),
    )  # fmt: skip


def _positioned(name: str, doc: str, angle: tuple[Scalar, ...], *rules: Rule) -> Row:
    most = (f"{heads} <= {MOST_BLOCKS // 2}" for heads in ("num_qo_heads", "num_kv_heads"))
    return row(
        name, f"{doc}; each token has a position of its own.", *_IN, POS_IDS, *angle,
        requires=(f"head_dim in {_HEAD_DIMS}", *most, _WHOLE_VECTORS, *rules),
    )  # fmt: skip


def cos_sin_cache(rotary_dim: str) -> Tensor:
    return Tensor(
        "cos_sin_cache", f"max_seq_len {rotary_dim}", "float32", contiguous=True, alignment=16,
        # With int32 positions the kernel counts its elements in 32 bits.
        offset_limit=2**32,
        doc="for each position the cosines of all pairs, then their sines; with interleave, up to "
            "32 bytes past the row of a position are read, and not used",
    )  # fmt: skip


_COS_SIN = row(
    "apply_rope_pos_ids_cos_sin_cache",
    "Rotate q and k by their positions, with cosines and sines from a table.",
    *_IN, cos_sin_cache("rotary_dim"), POS_IDS, INTERLEAVE,
    requires=(
        "rotary_dim >= 1", "head_dim % 8 == 0", "head_dim >= rotary_dim",
        "nnz == 0 or max_seq_len >= 1", f"rotary_dim <= {WIDE * MOST_THREADS}",
        Rule(
            "cos_sin_cache", _HAS_WHOLE_VECTORS,
            "of a rotary_dim that with interleave is a multiple of 16, or of 8 where head_dim is "
            "64, 128 or 256; and of twice that without", _WHOLE_VECTORS.using,
        ),
        Rule(
            "q",
            "fits_grid(num_qo_heads, num_kv_heads, rotary_dim, head_dim)",
            "of heads so few that (num_qo_heads + num_kv_heads) * (head_dim / rotary_dim, rounded "
            f"up) is at most {MOST_BLOCKS}", {"fits_grid": _fits_grid},
        ),
        Rule(
            "q_rope", f"reads_first({IN_PLACE}, interleave, rotary_dim, head_dim)",
            "memory apart from q (and k_rope from k) without interleave, unless head_dim is 64, "
            "128, 256 or 512, or rotary_dim 32, 64, 128, 256 or 512: else a warp may overwrite "
            "what another has yet to read", {"reads_first": _reads_before_it_writes},
        ),
    ),
)  # fmt: skip


ROWS = (
    _ragged("apply_rope", _ROPE, _ANGLE),
    _ragged("apply_llama31_rope", _ROPE_31, _ANGLE_31, _FACTORS),
    _positioned("apply_rope_pos_ids", _ROPE, _ANGLE),
    _positioned("apply_llama31_rope_pos_ids", _ROPE_31, _ANGLE_31, _FACTORS),
    _COS_SIN,
)
