"""The entries of attention above the core: single requests, batch attention, XQA and POD.

`FORMS` and `ROWS` have those of `fi_ffi.ops.attention.rows` as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.attention.rows import (
    BLOCK_SCALES,
    DECODE_DTYPES,
    F16,
    FA2_SCALARS,
    FAR,
    HEADS,
    IN_4_BITS,
    OF_FP8,
    PAGES,
    PREFILL_DTYPES,
    SHARED,
    WORKSPACES,
    add_plan,
    add_row,
    arguments,
    in_4_bits,
    number,
    output,
    variant_of,
)
from fi_ffi.ops.attention.rows import FORMS as FORMS
from fi_ffi.ops.call.row import Arg, IntArray, PlanInfo, Row, Rule, Tensor, Vector
from fi_ffi.ops.table.indices import last_pages, pages, starts

# One request.

_TENSORS = "q k v tmp o maybe_lse"
_SINGLE_DECODE_ARGS = arguments(
    f"{_TENSORS} kv_layout window_left maybe_alibi_slopes {FA2_SCALARS}",
    Tensor("q", "num_qo_heads head_dim_qk", "Q", "the query", contiguous=True),
    replace(SHARED["k"], contiguous=True),
    replace(SHARED["v"], axes=SHARED["k"].axes, contiguous=True),
    replace(SHARED["o"], axes="num_qo_heads head_dim_qk"),
    replace(SHARED["maybe_lse"], axes="num_qo_heads"),
    replace(SHARED["kv_layout"], strided=False),
)
# What modules.py adds to one request's prefill, by kernel.
_OF_ONE = {
    "fa2": f"maybe_custom_mask maybe_alibi_slopes {BLOCK_SCALES} {FA2_SCALARS}",
    "fa3": "maybe_scale_v logits_soft_cap sm_scale scale_v_scalar",
    "fa3_fp8": OF_FP8,
}


def _single_prefill(kind: str, doc: str, *own: Tensor, **fields: Any) -> Row:
    names = f"{_TENSORS} mask_mode_code kv_layout window_left {_OF_ONE[kind.removesuffix('_fp4')]}"
    args = arguments(names, output(kind), *own)
    fields |= {"nothing_axis": "nnz_qo"}
    return add_row("single_prefill.run", variant_of(kind), doc, args, **fields)


SINGLE_PREFILL = {
    kind: _single_prefill(kind, "Attention of one request.", dtypes=PREFILL_DTYPES[kind])
    for kind in _OF_ONE
}
_OVER_4_BITS = "Attention of one request, over keys and values of 4 bits."
SINGLE_PREFILL["fa2_fp4"] = _single_prefill(
    "fa2_fp4", _OVER_4_BITS, *in_4_bits(SHARED["k"], SHARED["v"]), **IN_4_BITS
)

# Prefill and decode requests of a batch in one persistent launch.  It turns page numbers into
# offsets in 32 bits, and loads values from where the keys' strides say.
_POOL_K = replace(SHARED["paged_k_cache"], name="k_cache", offset_limit=2**32)
_POOL_V = replace(SHARED["paged_v_cache"], name="v_cache", offset_limit=2**32)


def _attention_run(variant: str, of: str, *own: Tensor, **fields: Any) -> Row:
    names = f"{WORKSPACES} plan_info_vec q k_cache v_cache kv_indices o maybe_lse mask_mode_code "
    names += "kv_layout num_qo_heads num_kv_heads page_size v_scale sm_scale logits_soft_cap "
    args = arguments(names + BLOCK_SCALES, *own, number("v_scale", "factor of the output"))
    fields |= {"same_strides": ("k_cache", "v_cache"), "nothing_axis": "nnz_qo"}
    doc = f"Attention over a paged cache{of}, of prefills and decodes at once."
    return add_row("batch_attention.run", variant, doc, args, **fields)


_PLANNED = "qo_indptr kv_indptr kv_len batch_size num_qo_heads num_kv_heads head_dim_o causal"
BATCH_ATTENTION = (
    add_plan("batch_attention", "", _PLANNED),
    _attention_run("", "", _POOL_K, _POOL_V),
)
# The same over keys and values of 4 bits.  Later releases find scales by strides of their own,
# which their binding sets to 0: every token's scales are then those of the first.
_FP4_FIELDS = IN_4_BITS | {"releases": ">=0.6.10,<0.6.15"}
BATCH_ATTENTION_FP4 = (
    BATCH_ATTENTION[0],
    _attention_run("_fp4", " of 4 bits", *in_4_bits(_POOL_K, _POOL_V), **_FP4_FIELDS),
)

# xqa, decode attention for queries that share keys.  The kernels turn the caches' strides into
# heads, read those of the keys for both, and count heads in 32 bits.  The block that is last
# to count up a request's semaphore adds the request's pieces in `scratch`, and resets it to 0.

_ONE: dict[str, Any] = {"optional": True, "contiguous": True}
_CACHE = "num_pages page_size num_kv_heads head_dim"
# Rows of queries, of at most 256 elements and two numbers each, for every piece of a request;
# there are no more pieces than multiprocessors.
XQA_ROWS, _HEAD_DIM = 32, 256
SCRATCH_BYTES = XQA_ROWS * (4 * _HEAD_DIM + 8) + 1024
_GRID = 2**16 - 1  # blocks along a grid's second and third dimension


def semaphore_bytes(sizes: Mapping[str, int]) -> int:
    """A counter for each request and head of the keys, which both kernels number in that order."""
    return 4 * sizes["b"] * sizes["num_kv_heads"]


# Several queries a request, for speculative decoding: `XQA_ROWS` rows of queries and heads are a
# block's, and so are a counter and the pieces.


def query_blocks(q_seq_len: int, group: int) -> int:
    """Blocks that the queries of a request are, for each head of keys."""
    return -(-q_seq_len * group // XQA_ROWS)


def _counters(sizes: Mapping[str, int]) -> int:
    group = sizes["num_qo_heads"] // max(sizes["num_kv_heads"], 1)
    return semaphore_bytes(sizes) * query_blocks(sizes["q_seq_len"], group)


# The kernel for Hopper has both in one dimension of its grid, the other one has two for them.
_IN_A_GRID = Rule(
    "q",
    f"not run_sm90_fp8_mha or b * num_kv_heads <= {_GRID}",
    f"b * num_kv_heads of at most {_GRID}: the kernel has a block for each",
)
# Latent attention by the same kernels, for SM120: 128 heads of queries and one of keys, of which
# the values are the first 512 elements.  `q_scale` is all that logits are multiplied by but
# `kv_scale`.  Each request has four blocks and two buffers in `scratch`, of 128 rows of
# probabilities for a tile of keys, 64 bytes each, and two numbers; nothing counts semaphores up.
MLA_HEADS, MLA_DIM, MLA_DIM_VO = 128, 576, 512
_MLA_BUFFERS = 2 * MLA_HEADS * (64 + 8)
_MLA_CACHE = "num_pages 1 page_size head_dim"

# The entries of a request's page list that it has keys in.
_OF_REQUESTS = "columns(kvCachePageList) * page_size < seqLen"

_XQA_ARGS: tuple[Arg, ...] = (
    number("run_sm90_fp8_mha", "in fp8, by the kernel for Hopper", bool),
    number("multiProcessorCount", "multiprocessors to use", int),
    number("nbKHeads", "heads of the keys", int),
    number("slidingWinSize", "visible keys, the last ones; 0: all", int),
    number("qScale", "of the queries"),
    Tensor("qScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    Tensor("output", "b 1 num_qo_heads head_dim", "O", "the output", writes=True, reads=False,
           contiguous=True),
    number("rcpOutScale", "factor of an fp8 output"),
    Tensor("q", "b 1 num_qo_heads head_dim", "Q", "the queries", contiguous=True),
    Tensor("attentionSinks", "num_kv_heads group", "float32", "a logit more", **_ONE),
    Tensor("kCacheVLLM", _CACHE, "KV", "the keys' pages", offset_limit=FAR),
    Tensor("vCacheVLLM", _CACHE, "KV", "the values' pages", offset_limit=FAR),
    Tensor("kSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit keys", optional=True, since="0.6.7"),
    Tensor("vSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit values", optional=True,
           since="0.6.7"),
    Tensor("kvCachePageList", "b max_pages", "int32", "each request's pages", contiguous=True,
           index=(f"0 <= kvCachePageList < num_pages where {_OF_REQUESTS}",)),
    number("maxSeqLen", "room for keys in the pages", int),
    Tensor("seqLen", "b 1", "LEN", "each request's keys", contiguous=True,
           index=("qSeqLen <= seqLen <= max_pages * page_size",)),
    number("batchSize", "requests", int),
    number("kvCacheScale", "of keys and values"),
    Tensor("kvScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    number("qSeqLen", "queries in each request", int),
    Tensor("qCuSeqLens", "b+1", "uint32", "start of each request's queries", since="0.6.16",
           no_index="not given: all have as many queries", **_ONE),
    Tensor("mask", "b q_seq_len mask_words", "uint16", "bits", no_index="bits", **_ONE),
    Tensor("semaphores", "num_semaphores", "uint32", "0, and so afterwards", writes=True,
           contiguous=True, bytes_for=semaphore_bytes, zeroed=True, no_index="counters"),
    Tensor("scratch", "scratch_size", "uint8", "partial results", writes=True, reads=False,
           contiguous=True, alignment=128, bytes_per_multiprocessor=SCRATCH_BYTES),
    SHARED["enable_pdl"],
)  # fmt: skip
# The kernels read lengths as uint32; no length has other bits as int32.
_LENGTHS = {"LEN": ("uint32", "int32")}
_PAGE_SIZES = "page_size in (16, 32, 64, 128)"
_SIZES = ("head_dim % 16 == 0", f"b <= {_GRID}", f"num_kv_heads <= {_GRID}")
_XQA: dict[str, Any] = {
    "dtypes": {"Q": F16, "KV": (*F16, "float8_e4m3fn"), "O": (*F16, "float8_e4m3fn")} | _LENGTHS,
    "source": "csrc/flashinfer_xqa_binding.cu",
    "vector": Vector(("head_dim",)),
    "same_strides": ("kCacheVLLM", "vCacheVLLM"),
    "requires": (*HEADS, _PAGE_SIZES, *_SIZES, _IN_A_GRID),
    "capabilities": (9, 10, 11, 12),
    "nothing_axis": "b",
    "offset_limit": FAR,
}
_MLA_SIZES = (f"num_qo_heads in ({MLA_HEADS},)", f"head_dim in ({MLA_DIM},)")
_XQA_MLA: dict[str, Any] = _XQA | {
    "dtypes": {"Q": ("bfloat16", "float8_e4m3fn")} | _LENGTHS,
    "capabilities": (12,),
    "requires": (*_MLA_SIZES, _PAGE_SIZES, f"b <= {_GRID}"),
}


def _changed(**changes: Mapping[str, Any]) -> Iterator[Arg]:
    """The arguments of `xqa` with these fields of some of them changed."""
    for arg in _XQA_ARGS:
        yield replace(arg, **changes[arg.name]) if arg.name in changes else arg


_Q_SEVERAL = {"axes": "b 1 q_seq_len num_qo_heads head_dim"}
_XQA_SPEC_DEC_ARGS = tuple(
    _changed(
        q=_Q_SEVERAL,
        output=_Q_SEVERAL,
        mask={"alignment": 4},
        semaphores={"bytes_for": _counters},
    )
)
_SCRATCH = {"bytes_per_multiprocessor": 0, "bytes_for": lambda sizes: _MLA_BUFFERS * sizes["b"]}
_XQA_MLA_ARGS = arguments(
    "multiProcessorCount qScale qScaleTensor output q kCacheVLLM vCacheVLLM kvCachePageList "
    "maxSeqLen seqLen batchSize kvCacheScale kvScaleTensor semaphores scratch enable_pdl",
    *_changed(
        qScale={"doc": "what logits are multiplied by"},
        output={"axes": f"b 1 num_qo_heads {MLA_DIM_VO}", "dtype": "bfloat16"},
        q={"doc": "the queries, absorbed"},
        kCacheVLLM={"axes": _MLA_CACHE, "dtype": "Q"},
        vCacheVLLM={"axes": _MLA_CACHE, "dtype": "Q"},
        seqLen={"index": ("1 <= seqLen <= max_pages * page_size",)},
        semaphores={"bytes_for": lambda sizes: 4 * sizes["b"]},
        scratch=_SCRATCH,
    ),
)

# POD: a request's prefill and a batch's decode in one launch.  Both kinds of cache are handed
# over as NHD views, whatever their order.

_LAYOUT = number("layout", "0: tokens before heads", int)
_SLOPES = replace(SHARED["maybe_alibi_slopes"], doc="ALiBi's slopes: unused", as_object=False)
_OUTPUTS = "o maybe_lse mask_mode_code layout window_left maybe_custom_mask"
_OPTIONS = f"maybe_alibi_slopes {FA2_SCALARS}"
_PAGED = f"{WORKSPACES} plan_info_vec q paged_k_cache paged_v_cache qo_indptr {PAGES} {_OUTPUTS} "
_PAGED += f"maybe_mask_indptr {_OPTIONS}"


def _half(part: str, names: str, *own: Arg) -> tuple[Arg, ...]:
    """Arguments of the prefill (p) or of the decode (d)."""
    args = arguments(names, _LAYOUT, _SLOPES, *own)
    renamed = re.compile(rf"\b({'|'.join([arg.name for arg in args] + ['listed'])})\b")
    found: list[Arg] = []
    for arg in args:
        name = f"{arg.name}_{part}"
        if isinstance(arg, Tensor):
            places = tuple(renamed.sub(rf"\1_{part}", text) for text in arg.index)
            found.append(replace(arg, name=name, index=places))
        else:
            found.append(replace(arg, name=name))
    return tuple(found)


def _outputs(queries: str, axes: str, doc: str) -> Iterator[Tensor]:
    """A half's queries, outputs and logarithms, for so many rows."""
    heads = f"{axes} num_qo_heads head_dim"
    yield Tensor("q", heads, "Q", queries)
    yield replace(SHARED["o"], axes=heads, doc=doc)
    yield replace(SHARED["maybe_lse"], axes=f"{axes} num_qo_heads")


def _paged(cache: str) -> Iterator[Tensor]:
    """A half's caches, whose order is always NHD."""
    for name in ("paged_k_cache", "paged_v_cache"):
        yield replace(SHARED[name], axes=cache, kv=False)


def _masks(part: str, doc: str) -> Iterator[Tensor]:
    """The masks that neither half over pages reads."""
    yield Tensor("maybe_custom_mask", f"{part}_mask_bytes", "uint8", doc, **_ONE)
    indptr = f"{part}_mask_indptr"
    yield Tensor("maybe_mask_indptr", indptr, "int32", doc, no_index="not read", **_ONE)


_POD_PREFILL = _half(
    "p",
    f"q k v tmp {_OUTPUTS} {_OPTIONS}",
    *_outputs("the request's queries", "qo_len", "its output"),
    Tensor("k", "kv_len num_kv_heads head_dim", "KV", "its keys"),
    Tensor("v", "kv_len num_kv_heads head_dim", "KV", "its values"),
    Tensor("tmp", "tmp_size", "uint8", "partial results", writes=True, reads=False, alignment=16),
    Tensor("maybe_custom_mask", "mask_bytes", "uint8", "which keys each query sees", **_ONE),
)
_POD_DECODE = _half(
    "d",
    _PAGED,
    *_outputs("a query of each request", "b", "their outputs"),
    *_paged(_CACHE),
    starts("qo_indptr", "b+1", "where each request's query is", "b"),
    *_masks("d", "unused"),
    PlanInfo(),
)
_POD: dict[str, Any] = {"same_strides": ("paged_k_cache_d", "paged_v_cache_d")}
_POD |= {"offset_limit": FAR}
# The binding has no suffix for the schedule of its only plan.
_UNNAMED = tuple(PlanInfo() if isinstance(arg, PlanInfo) else arg for arg in _POD_DECODE)
# The same of a batch of prefills, over pages as well.
_BATCH_POD_PREFILL = _half(
    "p",
    _PAGED,
    IntArray("plan_info_vec"),
    *_outputs("the prefills' queries", "nnz_p", "their outputs"),
    *_paged("num_pages_p page_size num_kv_heads head_dim"),
    starts("qo_indptr", "b_p+1", "where each prefill's queries start", "nnz_p"),
    starts("paged_kv_indptr", "b_p+1", "where each prefill's pages start", "num_indices_p"),
    pages("paged_kv_indices", "the prefills' pages", "_p"),
    last_pages("paged_kv_last_page_len", "b_p", "paged_kv_indptr"),
    *_masks("p", "not read"),
)
_COUNTERS = replace(
    SHARED["o"],
    name="sm_aware_sched",
    axes="num_counters",
    dtype="int32",
    doc="counters of blocks: set to zero first",
)

SINGLE_DECODE, XQA, XQA_SPEC_DEC, XQA_MLA, POD, BATCH_POD = (
    add_row("single_decode.run", "", "Attention of one query.",
            _SINGLE_DECODE_ARGS, requires=(*HEADS, "nnz_kv >= 1"), dtypes=DECODE_DTYPES),
    add_row("xqa.xqa_wrapper", "", "Attention of one query of each request over a paged cache.",
            _XQA_ARGS, **_XQA),
    add_row("xqa.xqa_wrapper", "_spec_dec",
            "Attention of several queries of each request over a paged cache.",
            _XQA_SPEC_DEC_ARGS, **_XQA),
    add_row("xqa_mla.xqa_wrapper_mla", "",
            "Multi-head latent attention of one query of each request over a paged cache.",
            _XQA_MLA_ARGS, **_XQA_MLA),
    add_row("pod.pod_with_kv_cache_tensor", "",
            "A request's prefill and a batch's decode in one launch.",
            (*_POD_PREFILL, *_UNNAMED, SHARED["enable_pdl"]),
            requires=(*HEADS, "qo_len >= 1", "kv_len >= 1", "b >= 1"), **_POD),
    add_row("batch_pod.batch_pod_with_kv_cache_tensor", "",
            "A batch's prefills and another's decode in one launch.",
            (*_BATCH_POD_PREFILL, *_POD_DECODE, SHARED["enable_pdl"], _COUNTERS),
            requires=(*HEADS, "nnz_p >= 1", "b >= 1"), **_POD),
)  # fmt: skip

ROWS = tuple(FORMS)
