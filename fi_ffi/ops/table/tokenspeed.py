"""Kernels that `tokenspeed-kernel` publishes, in libraries of its own.

The rows' requirements follow its sources, `thirdparty/cuda/csrc`, and what an H100 gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.row import PDL, Absent, Arg, Row, Rule, Scalar, Tensor, Vector

_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
# The libraries have code for sm_90a, sm_100a and sm_103a.
_FIELDS: dict[str, Any] = {
    "releases": ">=0.1.4",
    "capabilities": (9, 10),
    "elsewhere": "its libraries have code for no other",
    "vector": Vector(()),
    "offset_limit": 2**63,
}


def _row(name: str, library: str, source: str, doc: str, *args: Any, **more: Any) -> Row:
    fields = {"symbol": name, "dtypes": {}, **_FIELDS, **more}
    module, source = f"tokenspeed-kernel/{library}", f"csrc/{source}"
    return Row(name, module, source=source, doc=doc, args=args, **fields)


# Of `top_ks`: all tokens, so that `top_ps` alone counts; and the most that the kernel sorts.
ALL_TOKENS, MOST_TOKENS = 2**30, 128


def topk_topp_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of `workspace`, as `fused_topk_topp_workspace_size` of the library does."""
    n, h = sizes["n"], sizes["h"]
    candidates, buffered = h // 32 // 64 * 64, round_up(h // 32, 256)
    counts = 8192 * n
    top_k = round_up(640 * n, 256) + counts + 4 * round_up(4 * n * candidates, 256) + 255
    top_p = round_up(384 * n, 256) + 3 * counts + 256 + 2 * round_up(4 * n * buffered, 256)
    return round_up(top_k, 256) + 2 * round_up(4 * n * MOST_TOKENS, 256) + top_p + 255


# Caches of bytes: tokens of one layer ("lf"), pages of one token with all its layers ("pf"), and
# pages with all tokens of a head together, and all layers of each ("ph").
_LAYER, _TOKEN_FIRST = "{}_tokens item", "{}_tokens layers item"
_HEADS, _HEAD_FIRST = "{}_tokens head_num part", "pages head_num page_size layers part"
_MOVED: dict[str, Any] = {"dtype": "uint8", "contiguous": True, "mapped": True}
_PLACES: dict[str, Any] = {"axes": "n", "dtype": "int64", "contiguous": True}
_LAYER_ID = Scalar("layer_id", int, None, "the layer of the source that is copied", low=0)
_HAS_LAYER = Rule("layer_id", "layer_id < layers", "a layer of the source")
_SPREAD = (
    Scalar("block_quota", int, 2, "blocks of threads, at most", low=1, high=INT32_MAX),
    Scalar("num_warps_per_block", int, 32, "warps of each", low=1, high=32),
)
_FROM_PAGES = {
    "_pf_lf": (
        _LAYER_ID,
        Absent("item_size", "int", of="item"),
        Absent("src_layout_dim", "int", of="layers * item"),
    ),
    "_ph_lf": (
        _LAYER_ID,
        Absent("item_size", "int", of="head_num * part"),
        Absent("src_layout_dim", "int", of="layers * head_num * part"),
        Absent("page_size", "int", of="page_size"),
        Absent("head_num", "int", of="head_num"),
    ),
    "": (Absent("item_size", "int", of="item"),),
}
_FROM = {"_pf_lf": _TOKEN_FIRST, "_ph_lf": _HEAD_FIRST, "": _LAYER}
_OF_WHAT = {
    "_pf_lf": "one layer of tokens, from a cache that has a token's layers together",
    "_ph_lf": "one layer of tokens, from pages that have a head's tokens together",
    "": "tokens",
}


def _transfer(layout: str, is_mla: bool = False) -> Row:
    """Return the row that copies tokens of one layer."""
    by_head = layout == "_ph_lf"
    of_source, of_target = _FROM[layout].format("src"), (_HEADS if by_head else _LAYER)
    size, room = ("part", "pages * page_size") if by_head else ("item", "src_tokens")
    tensors: list[Arg] = []
    for side, what in (("", "latents"),) if is_mla else (("_k", "keys"), ("_v", "values")):
        tensors += [
            Tensor(f"src{side}", of_source, doc=f"{what}, as bytes", **_MOVED),
            Tensor(
                f"dst{side}", of_target.format("dst"), doc="receives them", writes=True, **_MOVED
            ),
        ]
    return _row(
        f"transfer_kv_per_layer{'_mla' * is_mla}{layout}", "kvcacheio", "kvcacheio_transfer.cu",
        f"Copy {_OF_WHAT[layout]}: `dst[dst_indices] = src[src_indices]`, between GPU memory and "
        "page-locked host memory, or within either. The host may read what is written there "
        "after the stream is synchronised.",
        *tensors,
        Tensor(
            "src_indices", doc="the tokens", index=(f"0 <= src_indices < {room}",), **_PLACES
        ),
        Tensor(
            "dst_indices", doc="their places, each once", index=("0 <= dst_indices < dst_tokens",),
            **_PLACES,
        ),
        *_FROM_PAGES[layout],
        *_SPREAD,
        vector=Vector((size,)),
        nothing_axis="n",
        requires=(
            f"{size} % 4 == 0", f"{size} <= {INT32_MAX}", f"n <= {INT32_MAX}",
            *(("head_num >= 1", "page_size >= 1") if by_head else ()),
            *((_HAS_LAYER,) if layout else ()),
        ),
    )  # fmt: skip


# The kernels compute offsets of logits in ints.
_LOGITS = Tensor(
    "input", "n experts", "float32", "the router's logits", contiguous=True, alignment=16,
    offset_limit=2**31,
)  # fmt: skip
_BIAS = Tensor(
    "correction_bias", "experts", "float32", "added for the ranks alone; above -100000",
    contiguous=True, alignment=16,
)  # fmt: skip
_CHOSEN = Tensor("topk_indices", "n k", "int32", "the experts", **_OUT)
_WEIGHTS = Tensor("topk_weights", "n k", "float32", "their weights", alignment=16, **_OUT)
# What the two kernels for DeepSeek-V4 have in common; they take no other `renormalize`.
_SCALED = (
    replace(_CHOSEN, axes="n 6"),
    replace(_WEIGHTS, axes="n 6"),
    Absent("renormalize", "bool", value=1),
    Scalar("routed_scaling_factor", float, None, "sum of a token's weights", low=0.0),
)
_V4: dict[str, Any] = {"requires": ("experts in (256, 384)",)}
_FLASH = ("routing", "routing_flash.cu")

# Marlin's kernels read weights in tiles of 16 x 64, and count them in ints.
_REPACK = _row(
    "gptq_marlin_repack", "marlin", "gptq_marlin_repack.cu",
    "Put quantised weights [k, n] into the order in which Marlin's kernels read them.",
    Tensor("out", "tiles columns", "int32", "the same bits: 16 rows of weights in each", **_OUT),
    Tensor(
        "b_q_weight", "words n", "int32",
        "`32 // num_bits` rows of weights in each, the first in the low bits",
        contiguous=True, alignment=16, no_index="weights",
    ),
    Tensor(
        "perm", "16*tiles", "int32", "which row of the weights becomes each row; None: its own",
        contiguous=True, alignment=16, optional=True, empty=True,
        index=("0 <= perm < 16 * tiles",),
    ),
    Absent("size_k", "int", of="16 * tiles"),
    Absent("size_n", "int", of="n"),
    Scalar("num_bits", int, None, "bits of a weight", low=4, high=8, multiple_of=4),
    offset_limit=2**31,
    requires=(
        "n % 64 == 0",
        Rule("b_q_weight", "2 * words == tiles * num_bits", "num_bits / 2 rows for each of `out`"),
        Rule("out", "2 * columns == n * num_bits", "num_bits / 2 columns for each of the weights"),
    ),
)  # fmt: skip


_MOST_EXPERTS = 8192
_ALIGN = _row(
    "moe_align_block_size", "marlin_moe", "marlin_moe/moe_align_kernel.cu",
    "Sort the routes of tokens to experts, tokens * k in all, by expert, and fill up each "
    "expert's to whole blocks.",
    Tensor(
        "topk_ids", "tokens k", "int32", "the experts of each token; -1: none", contiguous=True,
        offset_limit=2**31, index=("-1 <= topk_ids < num_experts - 1",),
    ),
    Scalar("num_experts", int, None, "how many there are, plus 1", low=2, high=_MOST_EXPERTS),
    Scalar("block_size", int, None, "routes in a block", low=1, high=INT32_MAX),
    Tensor(
        "sorted_token_ids", "most", "int32", "each block's routes, in any order, and then as many "
        "`tokens * k` as make it whole; `tokens * k` after the last block", alignment=16, **_OUT,
    ),
    Tensor(
        "expert_ids", "blocks", "int32", "each block's expert; nothing is written after the last",
        writes=True, contiguous=True, no_index="written",
    ),
    Tensor("num_tokens_post_pad", "1", "int32", "how many there are in all blocks", **_OUT),
    Tensor(
        "cumsum_buffer", "starts", "int32", f"scratch of {_MOST_EXPERTS + 1} integers",
        bytes=4 * (_MOST_EXPERTS + 1), **_OUT,
    ),
    Absent("pad_sorted_token_ids", "bool", value=1),
    requires=(
        "tokens >= 1",
        "k >= 1",
        "most % 4 == 0",
        f"most <= {INT32_MAX - 3}",
        Rule(
            "sorted_token_ids",
            "most >= tokens * k + min(tokens * k, num_experts) * (block_size - 1)",
            "tokens * k + min(tokens * k, num_experts) * (block_size - 1) or more",
        ),
        Rule("expert_ids", "blocks * block_size >= most", "most / block_size or more"),
    ),
)  # fmt: skip

# What marlin_moe/include/scalar_type.hpp calls weights: bits of the exponent and of the mantissa,
# whether there is a sign, what is taken off, that there is no infinity; or that it is as IEEE's.
_E2M1, _UINT4B8 = 2 | 1 << 8 | 1 << 16 | 1 << 49, 4 << 8 | 8 << 17 | 1 << 50
_INTS: dict[str, Any] = {"dtype": "int32", "contiguous": True}


def _experts(is_ep: bool, is_int: bool) -> Row:
    """Return the row of products of tokens and experts; `is_ep`: blocks may have no expert."""
    symbol = f"moe_wna16_marlin_gemm_bf16{'_ep' * is_ep}"
    if is_int:
        kind, rows = "(4 bits - 8) * scale, rounded to bfloat16", "k / groups"
        scales, order, groups = ("experts groups n", "bfloat16"), "0, 8, 16 to 56", "groups"
        more: tuple[Any, ...] = (
            "groups >= 2",
            Rule("b_scales", "k in (32 * groups, 64 * groups, 128 * groups)",
                 "a scale for 32, 64 or 128 rows"),
        )  # fmt: skip
    else:
        kind, rows, order = "MXFP4", "32", "0, 16, 8, 24, 32, 48, 40, 56"
        scales, groups, more = ("experts k/32 n", "float8_e8m0fnu"), "k // 32", ()
    least, of_none = (-1, "; -1: none, and the block is left out") if is_ep else (0, "")
    args = (
        Tensor(
            "a", "m k", "bfloat16", "the tokens", contiguous=True, alignment=16, offset_limit=2**31
        ),
        Tensor(
            "c", "routes n", "bfloat16", "receives the products; rows of no block stay as they are",
            writes=True, contiguous=True, alignment=16, offset_limit=2**31,
        ),
        Tensor(
            "b_q_weight", "experts k/16 2*n", doc="4 bits of each, by `gptq_marlin_repack`",
            alignment=16, no_index="weights", **_INTS,
        ),
        Absent("b_bias"),
        Tensor(
            "b_scales", *scales, f"the scale of each {rows} weights of a column; of each 64 "
            f"columns {order}, then these plus 1, to plus 7",
            contiguous=True, alignment=16,
        ),
        *(Absent(name) for name in ("global_scale", "b_zeros", "g_idx", "perm")),
        Tensor(
            "workspace", "locks", doc="scratch of 4 integers for each multiprocessor, for one "
            "stream at a time, zero before its first use; by default fi_ffi keeps one for each "
            "stream",
            writes=True, zeroed=True, bytes_per_multiprocessor=16, no_index="scratch", **_INTS,
        ),
        Tensor(
            "sorted_token_ids", "most", doc="routes, token * top_k + choice, by "
            "`moe_align_block_size`; in a block, m * top_k stands after them for none",
            alignment=16, **_INTS,
            index=("0 <= sorted_token_ids <= routes where columns(sorted_token_ids) < "
                   "num_tokens_post_padded[0]",),
        ),
        Tensor(
            "expert_ids", "blocks", doc=f"each block's expert{of_none}", **_INTS,
            index=(f"{least} <= expert_ids < experts where columns(expert_ids) < "
                   "num_tokens_post_padded[0] // moe_block_size",),
        ),
        Tensor(
            "num_tokens_post_padded", "1", doc="how many routes are in blocks", **_INTS,
            index=("0 <= num_tokens_post_padded <= most",),
        ),
        Tensor("topk_weights", "m top_k", "float32", "of routes", contiguous=True),
        Absent("a_tmp"),
        Tensor(
            "c_tmp", "sums", "float32", "scratch of 65536 numbers for each multiprocessor",
            alignment=16, bytes_per_multiprocessor=4 * 4 * 64 * 256, **_OUT,
        ),
        Scalar(
            "moe_block_size", int, None, "routes in a block", low=8, high=64, multiple_of=8
        ),
        Absent("top_k", "int", of="top_k"),
        Scalar("mul_topk_weights", bool, False, "multiply the products by `topk_weights`"),
        Absent("is_ep", "bool", value=int(is_ep)),
        Absent("b_q_type_id", "int", value=_UINT4B8 if is_int else _E2M1),
        Absent("size_m", "int", of="m"),
        Absent("size_n", "int", of="n"),
        Absent("size_k", "int", of="k"),
        Absent("has_act_order", "bool"),
        Absent("has_bias", "bool"),
        Absent("is_k_full", "bool", value=1),
        Absent("has_zp", "bool"),
        Absent("num_groups", "int", of=groups),
        Absent("group_size", "int", of=f"k // ({groups})"),
        Absent("use_atomic_add", "bool"),
        Absent("use_fp32_reduce", "bool", value=1),
        Absent("is_zp_float", "bool"),
    )  # fmt: skip
    return _row(
        symbol + "_uint4b8" * is_int, "marlin_moe", "marlin_moe/moe_wna16_marlin.cuh",
        f"Multiply each route's token by its expert's weights: {kind}.",
        *args,
        symbol=symbol,
        requires=(
            *more,
            "k >= 64", "k % 64 == 0", "n % 128 == 0",
            # The kernel counts these in ints: weights and scales, and tiles of all blocks.
            f"n * k <= {INT32_MAX}",
            f"experts * n * k <= {512 * INT32_MAX}",
            f"k // 64 * n // 128 * most // 8 <= {INT32_MAX}",
            Rule("c", "routes == m * top_k", "m * top_k rows"),
            Rule("expert_ids", "blocks * moe_block_size >= most", "most / moe_block_size or more"),
            Rule(
                "moe_block_size", "moe_block_size == 8 or moe_block_size % 16 == 0",
                "8 or a multiple of 16",
            ),
        ),
    )  # fmt: skip


ROWS = (
    _experts(is_ep=False, is_int=False),
    _experts(is_ep=True, is_int=False),
    _experts(is_ep=False, is_int=True),
    _experts(is_ep=True, is_int=True),
    _REPACK,
    _ALIGN,
    _row(
        "softmax_topk_flash", *_FLASH,
        "Choose the experts of each token that are first by `softmax(input) + correction_bias` "
        "(ties by index), the first one first, with `softmax(input)` as weights.",
        _LOGITS,
        _BIAS,
        replace(
            _CHOSEN, dtype="I", doc="the experts; -1 for `num_experts_real` and those after it, "
            "which do nothing",
        ),
        _WEIGHTS,
        Scalar("num_experts_real", int, None, "how many experts do something", low=1),
        Scalar("scaling_factor", float, None, "the weights are scaled by it", low=0.0),
        Scalar("renormalize", bool, False, "divide the weights by their sum first"),
        PDL,
        dtypes={"I": ("int32", "int64")},
        requires=(
            "experts in (384, 576, 768, 896)",
            "experts >= k",
            Rule("topk_indices", "experts != 576 or k % 4 == 0", "k % 4 == 0 for 576 experts"),
            Rule(
                "num_experts_real", "num_experts_real < experts",
                "fewer than `input` has: the kernels take one or more that do nothing",
            ),
            Rule(
                "renormalize", "not renormalize or (experts == 576 and k <= 128)",
                "False, except for 576 experts and k <= 128: the kernels would ignore it",
            ),
        ),
    ),
    _row(
        "softplus_sqrt_topk_flash", *_FLASH,
        "Choose the 6 experts of each token that are first by `sqrt(softplus(input)) + "
        "correction_bias` (ties by index), the first one first. Their weights are "
        "`sqrt(softplus(input))`, scaled.",
        _LOGITS, _BIAS, *_SCALED, **_V4,
    ),
    _row(
        "hash_softplus_sqrt_topk_flash", *_FLASH,
        "Take the 6 experts of each token from its row in a table. Their weights are "
        "`sqrt(softplus(input))`, scaled.",
        _LOGITS,
        Tensor(
            "input_ids", "n", "I", "the tokens", contiguous=True,
            index=("0 <= input_ids < vocab",),
        ),
        Tensor(
            "hash_indices_table", "vocab 6", "int32", "each token's experts", contiguous=True,
            offset_limit=2**31, index=("0 <= hash_indices_table[input_ids] < experts",),
        ),
        *_SCALED,
        dtypes={"I": ("int32", "int64")},
        **_V4,
    ),
    _transfer(""),
    _transfer("", is_mla=True),
    _transfer("_pf_lf"),
    _transfer("_pf_lf", is_mla=True),
    _transfer("_ph_lf"),
    _row(
        "fused_topk_topp_renorm", "fused_topk_topp",
        "fused_topk_topp/fused_topk_topp_binding.cu",
        f"Keep the `top_ks` most probable tokens of each row, and of these the most probable that "
        f"have `top_ps` of their sum; scale them to sum to 1. From {MOST_TOKENS + 1} on, and not "
        f"for 2^30 alone, the kernel takes `top_ks` for all tokens.",
        Tensor(
            "probs", "n h", "float32", "rows that sum to 1", contiguous=True, offset_limit=2**31
        ),
        Tensor(
            "top_ks", "n", "int32", f"1 to {MOST_TOKENS}, or 2^30 for all tokens", contiguous=True,
            index=(f"1 <= top_ks <= {MOST_TOKENS} where top_ks != {ALL_TOKENS}",),
        ),
        Tensor("top_ps", "n", "float32", "more than 0, and 1 or less", contiguous=True),
        Tensor(
            "out", "n h", "float32", "0 for tokens that are not kept", offset_limit=2**31, **_OUT
        ),
        Tensor(
            "workspace", "workspace_size", "uint8", "scratch of "
            "`fused_topk_topp_workspace_size(n, h)` bytes, for one stream at a time; by default "
            "fi_ffi keeps one for each stream",
            writes=True, reads=False, contiguous=True, bytes_for=topk_topp_bytes,
        ),
        Absent("side_stream_handle", "int"),
        Absent("enable_pdl", "bool"),
        # The kernel sorts MOST_TOKENS tokens, whatever `top_ks` is; a grid's second dimension
        # counts rows.
        requires=(f"h >= {MOST_TOKENS + 1}", f"h <= {2**24}", f"n <= {2**16 - 1}"),
    ),
)  # fmt: skip
