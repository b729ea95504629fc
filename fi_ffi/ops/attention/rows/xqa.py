"""The entry of FlashInfer's `xqa` modules: decode attention for queries that share keys.

The kernels turn the caches' strides into heads, read those of the keys for both, and count
heads in 32 bits.  A request's pieces meet in `scratch`, where their sum is found by whoever
is last to count up its semaphore, which is 0 again then.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.attention.rows.arguments import F16, FAR, HEADS, number, row
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import Tensor, Vector

_ONE: dict[str, Any] = {"optional": True, "contiguous": True}
_CACHE = "num_pages page_size num_kv_heads head_dim"
# Rows of queries, of at most 256 elements and two numbers each, for every piece of a request;
# there are no more pieces than multiprocessors.
_ROWS, _HEAD_DIM = 32, 256
SCRATCH_BYTES = _ROWS * (4 * _HEAD_DIM + 8) + 1024
SEMAPHORES = 2**18  # of requests and heads of keys; their product is not more

_MASK = Tensor("mask", "b q_seq_len mask_words", "uint16", "bits", **_ONE)

XQA = forms_of(
    row(
        "xqa", "xqa_wrapper", "", "flashinfer_xqa_binding.cu",
        "Attention of one query of each request over a paged cache.",
        number("run_sm90_fp8_mha", "in fp8, by the kernel for Hopper", bool),
        number("multiProcessorCount", "multiprocessors to use", int),
        number("nbKHeads", "heads of the keys", int),
        number("slidingWinSize", "the last keys that are seen; 0: all", int),
        number("qScale", "of the queries"),
        Tensor("qScaleTensor", "1", "float32", "the same, on the device", **_ONE),
        Tensor("output", "b 1 num_qo_heads head_dim", "O", "the output", writes=True, reads=False,
               contiguous=True),
        number("rcpOutScale", "what the output is multiplied by, where it is fp8"),
        Tensor("q", "b 1 num_qo_heads head_dim", "Q", "the queries", contiguous=True),
        Tensor("attentionSinks", "num_kv_heads group", "float32", "a logit more", **_ONE),
        Tensor("kCacheVLLM", _CACHE, "KV", "the keys' pages", offset_limit=FAR),
        Tensor("vCacheVLLM", _CACHE, "KV", "the values' pages", offset_limit=FAR),
        Tensor("kSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit keys", optional=True,
               since="0.6.7"),
        Tensor("vSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit values", optional=True,
               since="0.6.7"),
        Tensor("kvCachePageList", "b max_pages", "int32", "each request's pages", contiguous=True),
        number("maxSeqLen", "keys that the pages have room for", int),
        Tensor("seqLen", "b 1", "uint32", "each request's keys", contiguous=True),
        number("batchSize", "requests", int),
        number("kvCacheScale", "of keys and values"),
        Tensor("kvScaleTensor", "1", "float32", "the same, on the device", **_ONE),
        number("qSeqLen", "queries of each request", int),
        Tensor("qCuSeqLens", "b+1", "uint32", "where each request's queries start",
               since="0.6.16", **_ONE),
        _MASK,
        Tensor("semaphores", "num_semaphores", "uint32", "0, and so afterwards", writes=True,
               contiguous=True, bytes=4 * SEMAPHORES, zeroed=True),
        Tensor("scratch", "scratch_size", "uint8", "partial results", writes=True, reads=False,
               contiguous=True, alignment=128, bytes_per_multiprocessor=SCRATCH_BYTES),
        number("enable_pdl", "programmatic dependent launch", bool),
        dtypes={"Q": F16, "KV": (*F16, "float8_e4m3fn"), "O": (*F16, "float8_e4m3fn")},
        vector=Vector(("head_dim",)), same_strides=("kCacheVLLM", "vCacheVLLM"),
        requires=(*HEADS, "page_size in (16, 32, 64, 128)", "head_dim % 16 == 0",
                  f"b * num_kv_heads <= {SEMAPHORES}"), capabilities=(9, 10, 11, 12),
        nothing_axis="b", offset_limit=FAR,
    )
)  # fmt: skip
