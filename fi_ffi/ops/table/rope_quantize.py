"""Rotary position embeddings with quantised results: the other entries of the `rope` module.

A thread of these kernels has 16 elements: 32 bytes of input and 16 of output. The elements that it
rotates are all of its own vector or all of its partner's. Strides are stored in 32 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.row import PDL, Absent, KvLayout, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table.page import INDEX_OF
from fi_ffi.ops.table.rope import (
    INDEX,
    INPUTS,
    INTERLEAVE,
    MOST_BLOCKS,
    MOST_THREADS,
    POS_IDS,
    WIDE,
    chunks,
    cos_sin_cache,
    row,
)

_QUANTISED = INPUTS | {"O": ("float8_e4m3fn", "float8_e5m2")} | INDEX
_SCALES = (
    Scalar("quant_scale_q", float, 1.0, "factor of queries", low=0.0),
    Scalar("quant_scale_kv", float, 1.0, "factor of keys and values", low=0.0),
)


def _in(name: str, heads: str, size: str, doc: str) -> Tensor:
    return Tensor(name, f"nnz {heads} {size}", "T", doc, stride_limit=2**32)


def _out(name: str, heads: str, size: str, doc: str) -> Tensor:
    return replace(_in(name, heads, size, doc), dtype="O", writes=True, reads=False)


def _both(heads: str) -> tuple[Tensor, ...]:
    return (
        _in("q_rope_in", "num_qo_heads", "rope_dim", "part of the queries to rotate"),
        _in("k_rope_in", heads, "rope_dim", "part of the keys to rotate"),
        _in("q_nope_in", "num_qo_heads", "no_rope_dim", "rest of the queries, or no elements"),
        _in("k_nope_in", heads, "no_rope_dim", "rest of the keys, or no elements"),
    )


_Q_OUT = (
    _out("q_rope_out", "num_qo_heads", "rope_dim", "`q_rope_in`, rotated and quantised"),
    _out("q_nope_out", "num_qo_heads", "no_rope_dim", "`q_nope_in`, quantised"),
)
_TABLE = (cos_sin_cache("rope_dim"), POS_IDS)


def _quantising(
    name: str,
    doc: str,
    *args: Tensor | Scalar | Absent | KvLayout,
    heads: str = "num_kv_heads",
    of_values: bool = False,
    requires: tuple[str, ...] = (),
    **more: Any,
) -> Row:
    """Return a row of the quantising kernels, with `heads` as the number of key heads.

    With `of_values`, the grid has blocks for values too.
    """

    count, values = f"(num_qo_heads + {heads})", f" + {heads}" * of_values
    told = f"{count} * (1 + no_rope_dim / rope_dim, rounded up)"
    return row(
        name,
        doc,
        *args,
        *_SCALES,
        INTERLEAVE,
        PDL,
        dtypes=_QUANTISED,
        vector=Vector(("rope_dim", "no_rope_dim")),
        in_place=(),
        requires=(
            "rope_dim >= 1",
            f"rope_dim % {WIDE} == 0",
            f"no_rope_dim % {WIDE} == 0",
            "nnz == 0 or max_seq_len >= 1",
            f"rope_dim <= {WIDE * MOST_THREADS}",
            *requires,
            Rule(
                "q_rope_in",
                f"interleave or rope_dim % {2 * WIDE} == 0",
                f"of a rope_dim that is a multiple of {2 * WIDE} without interleave",
            ),
            Rule(
                "q_rope_in",
                f"{count} * chunks(rope_dim, no_rope_dim){values} <= {MOST_BLOCKS}",
                f"of heads so few that {told}{values} is at most {MOST_BLOCKS}",
                {"chunks": chunks},
            ),
        ),
        **more,
    )


_PAGE: dict[str, Any] = {"dtype": "int32", "contiguous": True}
# Other tokens are left out.
_KEPT = "where batch_indices >= 0"


def _of_kept(name: str) -> tuple[str, ...]:
    return tuple(f"{text} {_KEPT}" for text in INDEX_OF[name])


_WHERE = (
    Tensor(
        "kv_indices",
        "num_indices",
        doc="pages of all requests, in order",
        index=_of_kept("kv_indices"),
        **_PAGE,
    ),
    Tensor(
        "kv_indptr",
        "b+1",
        doc="start of each request's pages in `kv_indices`, and the end",
        index=_of_kept("kv_indptr"),
        **_PAGE,
    ),
    Tensor(
        "batch_indices",
        "nnz",
        **_PAGE,
        doc="request of each token; since FlashInfer 0.6.8 a token with -1 is left out, with "
        "its queries",
        index=("batch_indices < b",),
    ),
    Tensor(
        "positions",
        "nnz",
        doc="its position in the request, from 0",
        index=_of_kept("positions"),
        **_PAGE,
    ),
)
_PAGE_SIZE = Scalar("page_size", int, None, "tokens in a page", low=1, size_of="page_size")
_TABLE_OF_KEPT = (_TABLE[0], replace(POS_IDS, index=(f"{POS_IDS.index[0]} {_KEPT}",)))
# The entry tells the caches that it is given by their addresses: those of a call have some.
_APPENDING = (
    "page_size >= 1",
    *(f"nnz == 0 or {size} >= 1" for size in ("num_pages", "num_indices", "b")),
    f"num_indices * page_size <= {2**32}",
    # Unlike the kernel without a cache, this one writes the last unrotated piece whole.
    "no_rope_dim % rope_dim == 0",
)


def _cache(name: str, axes: str, doc: str, kv: bool = False) -> Tensor:
    return Tensor(
        name, f"num_pages page_size {axes}", "O", doc, writes=True, kv=kv, stride_limit=2**32
    )


_APPEND = "rope_quantize_append_paged_kv_cache"
_HEADS, _HEAD_DIM = "num_kv_heads", "rope_dim+no_rope_dim"
ROWS = (
    _quantising(
        "rope_quantize",
        "Rotate a part of q and k by their positions, and quantise all of q and k: `out = "
        "fp8(rotated * scale)`, clamped to O's range.",
        *_both(_HEADS),
        _Q_OUT[0],
        _out("k_rope_out", _HEADS, "rope_dim", "`k_rope_in`, rotated and quantised"),
        _Q_OUT[1],
        _out("k_nope_out", _HEADS, "no_rope_dim", "`k_nope_in`, quantised"),
        *_TABLE,
    ),
    _quantising(
        _APPEND,
        "`rope_quantize`, with keys and values appended to a paged cache.",
        *_both(_HEADS),
        _in("v_in", _HEADS, _HEAD_DIM, "values to quantise"),
        *_Q_OUT,
        *_TABLE_OF_KEPT,
        _cache("k_cache", f"{_HEADS} {_HEAD_DIM}", "keys, the rotated part first", kv=True),
        _cache("v_cache", f"{_HEADS} {_HEAD_DIM}", "values", kv=True),
        Absent("ckv_cache"),
        Absent("kpe_cache"),
        *_WHERE,
        KvLayout(strided=False),
        _PAGE_SIZE,
        of_values=True,
        same_strides=("k_cache", "v_cache"),
        requires=("num_kv_heads >= 1", *_APPENDING),
    ),
    _quantising(
        "rope_quantize_append_paged_mla_kv_cache",
        "`rope_quantize`, with compressed keys appended to a paged MLA cache.",
        *_both("1"),
        Absent("v_in"),
        *_Q_OUT,
        *_TABLE_OF_KEPT,
        Absent("k_cache"),
        Absent("v_cache"),
        _cache("ckv_cache", "no_rope_dim", "`k_nope_in`, quantised"),
        _cache("kpe_cache", "rope_dim", "`k_rope_in`, rotated and quantised"),
        *_WHERE,
        Absent("kv_layout", "int"),
        _PAGE_SIZE,
        heads="1",
        symbol=_APPEND,
        requires=("no_rope_dim >= 1", *_APPENDING),
    ),
)
