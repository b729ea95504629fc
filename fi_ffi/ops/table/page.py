"""Appending to a paged KV cache: entries of FlashInfer's `page` module.

The kernels (`include/flashinfer/page.cuh`) assume int32 indices without a check, store the caches'
strides in 32 bits, and count the tokens of a request's pages in 32 bits and elements in 64.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import KvLayout, Row, Rule, Tensor, Vector

_SOURCE = "csrc/flashinfer_page_binding.cu"
_T: dict[str, tuple[str, ...]] = {"T": ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")}
_INDEX: dict[str, Any] = {"dtype": "int32", "contiguous": True}
_CACHE: dict[str, Any] = {"dtype": "T", "writes": True, "stride_limit": 2**32}
_LIMITS = (
    "page_size >= 1",
    "nnz == 0 or num_pages >= 1",
    "nnz == 0 or num_indices >= 1",
    "nnz == 0 or b >= 1",
    # The launcher adds the number of multiprocessors to it in an int.
    f"nnz <= {2**31 - 2**10}",
    f"num_indices * page_size <= {2**32}",
)

# The entries of a page table that the new tokens need.
_START, _END = "kv_indptr[batch_indices]", "kv_indptr[batch_indices + 1]"
INDEX_OF = {
    "positions": (f"0 <= positions < ({_END} - {_START}) * page_size",),
    "kv_indices": (f"0 <= kv_indices[{_START} + positions // page_size] < num_pages",),
    "kv_indptr": (f"0 <= {_START} <= num_indices", f"{_END} <= num_indices"),
}
_WHERE = (
    Tensor(
        "batch_indices",
        "nnz",
        doc="request of each new token",
        index=("0 <= batch_indices < b",),
        **_INDEX,
    ),
    Tensor(
        "positions",
        "nnz",
        doc="its position in the request, from 0",
        index=INDEX_OF["positions"],
        **_INDEX,
    ),
)
_PAGES = (
    Tensor(
        "kv_indices",
        "num_indices",
        doc="pages of all requests, in order",
        index=INDEX_OF["kv_indices"],
        **_INDEX,
    ),
    Tensor(
        "kv_indptr",
        "b+1",
        doc="start of each request's pages in `kv_indices`, and the end",
        index=INDEX_OF["kv_indptr"],
        **_INDEX,
    ),
    Tensor(
        "kv_last_page_len",
        "b",
        doc="tokens in each request's last page",
        no_index="not read",
        **_INDEX,
    ),
)


def _row(
    name: str, doc: str, *args: Tensor | KvLayout, requires: tuple[str, ...], **fields: Any
) -> Row:
    return Row(
        name,
        "page",
        name,
        _SOURCE,
        doc,
        args,
        dtypes=_T,
        releases=">=0.6.3",
        offset_limit=2**63,
        requires=(*requires, *_LIMITS),
        nothing_axis="nnz",
        **fields,
    )


# A quantised cache: bytes of two elements, and a scale for each block of 16.
_TO_APPEND: dict[str, Any] = {"dtype": "H", "in_vectors": False}
_PACKED: dict[str, Any] = {
    "axes": "num_pages page_size num_kv_heads head_dim/2", "dtype": "uint8", "kv": True,
    "writes": True, "doc": "two e2m1 elements in a byte, the first in the low half",
}  # fmt: skip
_SCALES: dict[str, Any] = {
    "axes": "num_pages page_size num_kv_heads head_dim/16", "dtype": "float8_e4m3fn", "kv": True,
    "writes": True, "doc": "the scale of every 16 elements: `largest / 6 / {}`",
}  # fmt: skip
_FP4_CACHES = tuple(
    Tensor(name, **{**fields, "doc": fields["doc"].format(name[0] + "_scale")})
    for name, fields in (
        ("paged_k_cache", _PACKED),
        ("paged_v_cache", _PACKED),
        ("k_scale_cache", _SCALES),
        ("v_scale_cache", _SCALES),
    )
)
_POSITIVE = "scale of all {}, positive and finite"

ROWS = (
    Row(
        "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
        "page",
        "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
        _SOURCE,
        "Quantise the keys and values of new tokens to NVFP4, and write each to its slot of a "
        "paged cache. Rows after the last slot are not read.",
        (
            Tensor("append_key", "rows num_kv_heads head_dim", doc="keys", **_TO_APPEND),
            Tensor("append_value", "rows num_kv_heads head_dim", doc="values", **_TO_APPEND),
            Tensor(
                "slot_mapping",
                "nnz",
                "I",
                "page * page_size + entry of each token; a token whose slot is negative, or beyond "
                "the cache, is skipped. Two tokens of one slot are a race",
                contiguous=True,
                no_index="slots outside the cache are skipped",
            ),
            *_FP4_CACHES,
            Tensor("k_scale", "1", "float32", f"{_POSITIVE.format('keys')}: else the kernel traps"),
            Tensor(
                "v_scale", "1", "float32", f"{_POSITIVE.format('values')}: else the kernel traps"
            ),
            KvLayout(strided=False),
        ),
        dtypes={"H": ("float16", "bfloat16"), "I": ("int32", "int64")},
        releases=">=0.6.15",
        vector=Vector(()),
        offset_limit=2**63,
        nothing_axis="nnz",
        requires=(
            "head_dim in (64, 128, 256, 512)",
            "num_kv_heads <= 65535",
            "page_size >= 1",
            f"nnz <= {INT32_MAX}",
            f"num_pages <= {2**32 - 1}",
            f"page_size <= {2**32 - 1}",
            Rule("append_key", "nnz <= rows", "a row for every slot"),
        ),
    ),
    _row(
        "append_paged_kv_cache",
        "Append the keys and values of new tokens to a paged cache.",
        Tensor("append_key", "nnz num_kv_heads head_dim", "T", "keys of the new tokens"),
        Tensor("append_value", "nnz num_kv_heads head_dim", "T", "values of the new tokens"),
        *_WHERE,
        Tensor(
            "paged_k_cache",
            "num_pages page_size num_kv_heads head_dim",
            doc="keys; for one tensor with both, see `split_paged_kv_cache`",
            kv=True,
            **_CACHE,
        ),
        Tensor(
            "paged_v_cache",
            "num_pages page_size num_kv_heads head_dim",
            doc="values",
            kv=True,
            **_CACHE,
        ),
        *_PAGES,
        KvLayout(strided=False),
        vector=Vector(("head_dim",), threads=32),
        block=("num_kv_heads",),
        requires=("num_kv_heads >= 1", "head_dim in (64, 128, 256, 512)"),
        same_strides=("paged_k_cache", "paged_v_cache"),
    ),
    _row(
        "append_paged_mla_kv_cache",
        "Append the compressed keys and values of new tokens to a paged MLA cache.",
        Tensor("append_ckv", "nnz head_dim_ckv", "T", "compressed keys and values"),
        Tensor("append_kpe", "nnz head_dim_kpe", "T", "the keys' part with the position encoding"),
        *_WHERE,
        Tensor(
            "ckv_cache", "num_pages page_size head_dim_ckv", doc="cache of `append_ckv`", **_CACHE
        ),
        Tensor(
            "kpe_cache", "num_pages page_size head_dim_kpe", doc="cache of `append_kpe`", **_CACHE
        ),
        *_PAGES,
        # The kernel loads 16 bytes from 0.6.16 on, and two elements before.
        vector=Vector(("head_dim_ckv", "head_dim_kpe")),
        requires=("head_dim_ckv in (512,)", "head_dim_kpe in (64,)"),
    ),
)
