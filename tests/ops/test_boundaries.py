"""What kernels take of a size or a number: at each bound, just below and just above it.

`BOUNDS` is read from FlashInfer's sources, not from rows: the types in which its kernels count, the
limits of CUDA's grids, the sizes that it compiles for, and what it loads at a time.  Tensors lie at
addresses that nothing is at; where they are small, calls are made as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi.tensor import parse_device
from fi_ffi.catalogue.ahead_of_time import known_releases
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.memory import scratch_bytes
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import MOVES
from fi_ffi.reference.formula import as_inputs

from tests.attention.machines import Cpu
from tests.helpers.calls import MOST_HEADS
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs import inputs_of
from tests.helpers.limits import FAR, Bound, Floats, misjudged, unbounded
from tests.helpers.prepared_calls import refusal_of
from tests.helpers.rope_calls import ANGLES, APPLY, COS_SIN, LLAMA_31, QUANTISE
from tests.helpers.sampling_calls import SAMPLERS
from tests.helpers.tokenspeed import DEFINITIONS
from tests.ops.test_limits import described
from tests.ops.test_results import (
    APPENDS,
    CHAIN,
    DIT,
    GATED,
    MERGES,
    NORMS,
    ROUTERS,
    SLOTS,
    TOP_K,
    TOP_KS,
)

INT, UINT = 2**31, 2**32  # what an int32 and a uint32 stay below
GRID = 2**16  # blocks along a grid's second and third dimension stay below it


def cut(whole: int, part: int) -> int:
    return len(range(0, whole, part))


def tiles(rows: int, columns: int, of: int = 128) -> int:
    """Scales in tiles of so many rows and 4 columns."""
    return of * cut(rows, of) * 4 * cut(columns, 4)


CPU = Cpu()
B = Bound


# Arrays in place of numbers, which then are not looked at.
NO_ARRAYS = {"maybe_top_k_arr": None, "maybe_top_p_arr": None, "maybe_min_p_arr": None,
             "maybe_temperature_arr": None}  # fmt: skip
DRAWS = (*SAMPLERS, "sampling_from_logits")
PAGED = (*QUANTISE[1:], *APPENDS)
TINY = ("tinygemm2", "tinygemm2_nobias")
OF_BOTH = "fused_topk_topp_renorm"
WORKSPACES = (
    (1, 129, 37887), (3, 1000, 111615), (2, 32_000, 117503), (1, 129_280, 133119),
    (7, 129_280, 925695),
)  # fmt: skip
BY_TOKEN = tuple(
    f"transfer_kv_per_layer{of}" for of in ("", "_mla", "_pf_lf", "_mla_pf_lf")
)  # fmt: skip
BY_HEAD = "transfer_kv_per_layer_ph_lf"
OF_V4 = ("softplus_sqrt_topk_flash", "hash_softplus_sqrt_topk_flash")
WNA16 = tuple(f"moe_wna16_marlin_gemm_bf16{of}" for of in ("", "_ep", "_uint4b8", "_ep_uint4b8"))
INT4 = WNA16[2:]
SM100 = ("fp4_gemm", "mxfp8_gemm", "bf16_gemm", "bmm_bf16", "bmm_mxfp8", "tgv_gemm")
TURNED = "fused_qk_rmsnorm_rope"
ONE_TOKEN = {"nnz": 1, "num_qo_heads": 1, "num_kv_heads": 1}


def same(size: int) -> int:
    return size


def rows_apart(stride: int) -> dict[str, Any]:
    return {"strides": (stride, 1)}


def pages_apart(stride: int) -> dict[str, Any]:
    return {"strides": (stride, 128, 64, 1)}


def within_int(count: int) -> int:
    return min(max(count, 1), INT - 1)


def rest_of_256(part: int) -> int:
    return min(max(256 - part - part % 2, 0), 256)


BOUNDS = [
    # norm.cuh: sizes and offsets are uint32_t.
    B(NORMS, "h", range(1, FAR)),
    B([*NORMS], "eps", Floats(0.0)),
    B([name for name in NORMS if name != "qk_rmsnorm"], "n", range(2**20 + 1), {"h": 4096},
      says=f"{UINT}"),
    B("qk_rmsnorm", "n", range(2**18 + 1), {"k": 4, "h": 4096}, says=f"{UINT}"),
    # Of rows of an odd size, offsets in an int.
    B("layernorm", "n", range(INT), {"h": 1}),
    B("layernorm", "n", range(INT), {"h": 2}, says=f"{INT - 1}|{UINT}"),
    B("layernorm", "n", range(INT // 3 + 1), {"h": 3}, says=f"{INT} elements"),
    B(DIT, "n", range(INT), {"num_rows": 0}),
    B(DIT, "num_rows", range(INT), {"n": 0}),
    B(DIT, "n", range(UINT // 3072 + 1), {"num_rows": 1}, says=f"{UINT}"),
    B(DIT, "epsilon", Floats(0.0)),
    B(TURNED, "head_dim", (64, 128, 256), {
        "num_frame_channels": lambda size: size // 2, "num_width_channels": 0,
        "num_height_channels": lambda size: size - size // 2}),
    B(TURNED, "n", range(INT)),
    *(B(TURNED, f"num_heads_{part}", range(33)) for part in "qkv"),
    *(B(TURNED, f"num_{part}_channels", range(0, 257, 2), {
        "head_dim": 256, "num_frame_channels": rest_of_256, "num_width_channels": 0,
        "num_height_channels": 0 if part != "frame" else rest_of_256})
      for part in ("width", "height", "frame")),
    B(TURNED, "num_tokens", (7,), {"n": 7}),
    *(B(TURNED, name, range(1, INT), {"ppf": 1, "pph": 1, "ppw": 1, "seq_len": within_int})
      for name in ("ppf", "pph", "ppw")),
    B(TURNED, "seq_len", range(1, INT), {"ppf": within_int, "pph": 1, "ppw": 1}),
    *(B(TURNED, name, Floats(0.0), {"factor": 1.5}) for name in (
        "eps", "low", "high", "attention_factor", "output_quant_scale", "v_quant_scale")),
    *(B(TURNED, name, Floats(1e-6)) for name in ("base", "factor")),
    # Rows that lie apart: those that are written do not overlap, and all start at whole vectors.
    *(B("rmsnorm", "stride", range(first, UINT - 16), {
        "n": 2, "h": 17, name: rows_apart}, "overlap|0 or more|offsets below")
      for name, first in (("out", 17), ("input", 0))),
    *(B("rmsnorm", "stride", range(first, UINT - 15, 8), {
        "n": 2, "h": 16, name: rows_apart}, "overlap|0 or more|offsets below|multiples of the 8")
      for name, first in (("out", 16), ("input", 0))),
    B(APPENDS[0], "stride", range(512, UINT, 8), {
        "num_kv_heads": 2, "head_dim": 64, "page_size": 4, "num_pages": 3,
        "paged_k_cache": pages_apart, "paged_v_cache": pages_apart},
      "overlap|below 4294967296|multiples"),
    *(B("concat_mla_k", "stride", range(first, 19173952, 4), {
        name: lambda apart, size=size: {"strides": (apart, size, 1)}},
        "overlap|below 19173952|multiples of the 4|0 or more")
      for name, size, first in (("k", 192, 128 * 192), ("k_nope", 128, 0))),
    # activation.cuh: an int of `2 * d`; vectors of 16 bytes until 0.7.1.
    B(GATED, "n", range(INT), {"d": 8}),
    B(GATED, "d", range(8, INT // 2, 8), {"n": 1}, f"1$|{INT // 2 - 1}|multiple of 8",
      "<0.7.1"),
    B(GATED, "d", range(1, INT // 2), {"n": 1}, releases=">=0.7.1"),
    # pos_enc.cuh.
    B(ANGLES, "head_dim", (64, 128, 256, 512)),
    *(B(ANGLES, "rotary_dim", range(0, size + 1, step), {"head_dim": size, "interleave": way},
        "multiple of 8|0 or more|the size of head_dim")
      for size, way, step in ((64, False, 16), (64, True, 8), (128, False, 16), (256, True, 8),
                              (512, False, 32), (512, True, 16))),
    B(APPLY, "nnz", range(INT), {"num_qo_heads": 1, "num_kv_heads": 1}),
    B(ANGLES[:2], "b", range(1, INT // 2), ONE_TOKEN, f"b of at least 1|{INT // 2 - 1}"),
    B(ANGLES[:2], "b", range(INT // 2), {"nnz": 0, "num_qo_heads": 1, "num_kv_heads": 1},
      f"{INT // 2 - 1}"),
    *(B(ANGLES[:2], f"num_{of}_heads", range(of == "qo", (INT // 2 - 1) // 3 + 1),
        {"nnz": 1, "b": 3}, f"1|{INT // 2 - 1}") for of in ("qo", "kv")),
    *(B(ANGLES[2:], f"num_{of}_heads", range(of == "qo", GRID // 2), {"nnz": 1})
      for of in ("qo", "kv")),
    *(B(ANGLES, name, Floats(1e-6)) for name in ("rope_scale", "rope_theta")),
    *(B(LLAMA_31, name, Floats(0.0)) for name in ("low_freq_factor", "old_context_length")),
    B(LLAMA_31, "high_freq_factor", Floats(math.nextafter(1.5, 2)), {"low_freq_factor": 1.5},
      "more than|or more|finite"),
    *(B(COS_SIN, "rotary_dim", range(step, size + 1, step), {"head_dim": size, "interleave": way},
        "")
      for size, way, step in ((64, False, 16), (128, True, 8), (512, False, 32), (512, True, 16),
                              (96, False, 32), (96, True, 16))),
    B(COS_SIN, "rotary_dim", range(32, 2**14 + 1, 32), {"head_dim": 2**15, "interleave": False},
      "."),
    # A head's pieces of 32 elements, for 6 heads: blocks along a grid's second dimension.
    B(COS_SIN, "head_dim", range(32, 32 * 10922 + 1, 8), {
        "rotary_dim": 32, "num_qo_heads": 4, "num_kv_heads": 2, "interleave": False, "nnz": 1},
      "."),
    B(COS_SIN, "num_qo_heads", range(1, GRID - 2), {"nnz": 1, "num_kv_heads": 2}, "."),
    B(COS_SIN, "num_kv_heads", range(GRID - 4), {"nnz": 1, "num_qo_heads": 4}, "."),
    B(COS_SIN, "max_seq_len", range(1, 2**26 + 1), {"rotary_dim": 64}, f"1|{UINT}"),
    B(COS_SIN, "max_seq_len", range(2**26 + 1), {"rotary_dim": 64, "nnz": 0}, f"{UINT}"),
    B(QUANTISE, "nnz", range(INT), {"num_qo_heads": 1, "num_kv_heads": 1}),
    *(B(QUANTISE, "rope_dim", range(step, 2**14 + 1, step), {
        "no_rope_dim": lambda size: max(size, 0), "interleave": way}, ".")
      for way, step in ((False, 32), (True, 16))),
    B(QUANTISE[0], "no_rope_dim", range(0, 32 * 10921 + 1, 16), {"interleave": True}, "."),
    B(QUANTISE[1], "no_rope_dim", range(0, 32 * 10921 + 1, 32), says="."),
    B(QUANTISE[2], "no_rope_dim", range(32, 32 * 13106 + 1, 32), says="."),
    # Three pieces of a head, and of a paged cache's also the values.
    *(B(name, "num_qo_heads", range(1, most + 1), {"nnz": 1}, "1|65535")
      for name, most in zip(QUANTISE, (21843, 21842, 21844), strict=True)),
    B(QUANTISE[0], "num_kv_heads", range(21841 + 1), {"nnz": 1}, "65535"),
    B(QUANTISE[1], "num_kv_heads", range(1, 16380 + 1), {"nnz": 1}, "1|65535"),
    B(QUANTISE, "max_seq_len", range(1, 2**27 + 1), {"rope_dim": 32}, f"1|{UINT}"),
    *(B(QUANTISE, f"quant_scale_{of}", Floats(0.0)) for of in ("q", "kv")),
    # page.cuh: entries of a table are counted in a uint32_t.
    B(PAGED, "page_size", range(1, UINT + 1), {"num_indices": 1, "num_pages": 1}, f"1|{UINT}"),
    B(PAGED, "num_indices", range(1, UINT // 4 + 1), {"page_size": 4}, f"1|{UINT}"),
    *(B(PAGED, name, range(first, FAR), {"nnz": nnz})
      for name in ("b", "num_pages") for first, nnz in ((0, 0), (1, 6))),
    B(APPENDS, "nnz", range(INT - 2**10 + 1), {"num_kv_heads": 1}),
    B(APPENDS[0], "head_dim", (64, 128, 256, 512)),
    *(B(APPENDS[0], "num_kv_heads", range(1, most + 1), {"head_dim": size, "T": dtype})
      for dtype, size, most in MOST_HEADS),
    B(APPENDS[1], "head_dim_ckv", (512,)),
    B(APPENDS[1], "head_dim_kpe", (64,)),
    *(B("concat_mla_k", name, (size,)) for name, size in (
        ("num_heads", 128), ("nope_dim", 128), ("rope_dim", 64))),
    B("concat_mla_k", "n", range(2**24 + 1)),
    # cascade.cuh: a block of 1024 threads, of which 64 elements take 8; offsets are uint32_t.
    B(MERGES, "head_dim", (64, 128, 256, 512)),
    B(MERGES, "n", range(INT), {"num_heads": 0}),
    B(MERGES[:2], "n", range(UINT // 64 + 1), {"num_heads": 1}, f"{UINT}"),
    *(B(MERGES[:2], "num_heads", range(8 * 1024 // max(size, 64) + 1), {"head_dim": size})
      for size in (64, 128, 256)),
    B(MERGES[2], "num_heads", range(129), {"n": 3, "num_index_sets": 2}, "1024"),
    B(MERGES[2], "num_heads", range(GRID), {"n": 1, "num_index_sets": 1}),
    # gdn: as many heads of keys and values as the fewer, states as the more.
    B("gdn_prefill", "workspace_size", range(128, FAR)),
    B("gdn_prefill", "head_size", (128,)),
    B("gdn_prefill", "scale", Floats(0.0)),
    B("gdn_prefill", "checkpoint_every_n_tokens", range(64, FAR, 64),
      says="0 or more|multiple of 64|go together", releases=">=0.6.8"),
    B("gdn_prefill", "total_seq_len", range(2, INT), {"num_seqs": 2}, releases="<0.6.14"),
    B("gdn_prefill", "total_seq_len", range(INT), {"num_seqs": 2}, releases=">=0.6.14"),
    B("gdn_prefill", "num_q_heads", range(1, FAR), {
        f"num_{of}_heads": same for of in ("k", "v", "sab")}),
    B("gdn_prefill", "num_v_heads", range(1, FAR), {
        "num_q_heads": 2, "num_k_heads": lambda count: min(max(count, 1), 2),
        "num_sab_heads": lambda count: max(2, count)}, "num_v_heads"),
    *(B("gdn_prefill", "num_k_heads", (min(q, v),), {
        "num_q_heads": q, "num_v_heads": v, "num_sab_heads": max(q, v)}, "1|min")
      for q, v in ((1, 1), (1, 3), (4, 2), (2, 4))),
    *(B("gdn_prefill", "num_sab_heads", (max(q, v),), {
        "num_q_heads": q, "num_v_heads": v, "num_k_heads": min(q, v)}, "max|multiple")
      for q, v in ((1, 1), (1, 3), (4, 2), (2, 4))),
    # States of 4 heads, each of 128 by 128: offsets in an int.
    B("gdn_prefill", "num_seqs", range(2**15 + 1), {"total_seq_len": 2**20}, f"{INT}", "<0.6.14"),
    B("gdn_prefill", "num_seqs", range((INT - 1) // 4 + 1), {"slots": same}, f"{INT - 1}",
      ">=0.6.14"),
    B("gdn_prefill", "slots", (2,), {"state_indices": None}, ".", ">=0.6.14"),
    # Products: cuBLAS takes ints, and here vectors of 16 bytes.
    B("bmm_fp8", "cublas_handle", range(FAR), releases="<0.7"),
    B("bmm_fp8", "k", range(16, INT, 16), {"b": 1, "m": 1}),
    B("bmm_fp8", "n", range(0, INT, 16), {"b": 1, "m": 1}),
    B("bmm_fp8", "m", range(INT), {"b": 1}),
    B("bmm_fp8", "m", range(INT // 32), {"b": 2, "k": 32}, "several"),
    B("bmm_fp8", "m", range((INT - 1) // 48 + 1), {"b": 2, "k": 16, "n": 48}, "several"),
    B("bmm_fp8", "n", range(0, INT // 32, 16), {"b": 2, "m": 1, "k": 32}, "several|16"),
    B(TINY, "k", range(64, 1025, 8), says=".", releases="<0.6.14"),
    B(TINY, "k", range(64, INT // 16, 8), {"n": 1, "m": 16}, f"64|8|{INT - 1}", ">=0.6.14"),
    B(TINY, "m", range(16, INT // 64, 16), {"n": 1, "k": 64}, f"16|{INT - 1}"),
    B(TINY, "n", range(8 * (GRID - 1) + 1), {"m": 16, "k": 64}),
    B(ROUTERS, "n", range(17)),
    B("fp8_quantize_1x128", "k128", range(1, INT // 128), {"n": 1, "n4": 4}),
    B("fp8_quantize_1x128", "n", range(INT), {"n4": lambda n: 4 * cut(n, 4), "k128": 1}),
    *(B("fp8_quantize_1x128", "n4", (room,), {"n": n}, "rounded up to a multiple of 4")
      for n, room in ((0, 0), (1, 4), (3, 4), (4, 4), (5, 8), (8, 8), (9, 12))),
    # Bits: a thread has a byte of 8, a block 256 threads.
    B("packbits", "n", range((INT - 1) * 2048 + 1), {"num_bytes": lambda n: cut(n, 8)}),
    *(B("packbits", "num_bytes", (count,), {"n": n}, "a byte for every 8")
      for n, count in ((0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (15, 2), (16, 2), (17, 3))),
    B("segment_packbits", "n", range(INT)),
    B("segment_packbits", "b", range(INT)),
    # Blocks of 16 or 32 with a scale each: 48 kB of shared memory have a number, and scales.
    B("nvfp4_kv_dequant", "blocks", range(1, 49148 + 1), {"n": 1}),
    B(("nvfp4_kv_dequant", "nvfp4_kv_quant"), "n", range(INT // 48 + 1), {"blocks": 3}, f"{INT}"),
    # A block for a token and a head; pages, and tokens of one, are counted in uint32_t.
    B(SLOTS, "nnz", range(INT), {"rows": same, "num_kv_heads": 1}),
    B(SLOTS, "num_kv_heads", range(GRID)),
    B(SLOTS, "num_pages", range(UINT), {"num_kv_heads": 1}),
    B(SLOTS, "page_size", range(1, UINT), {"num_kv_heads": 1}),
    B(SLOTS, "head_dim", (64, 128, 256, 512)),
    *(B(SLOTS, "rows", range(nnz, FAR), {"nnz": nnz}, "a row for every slot") for nnz in (0, 9)),
    B("nvfp4_kv_quant", "blocks", range(1, INT // 16 + 1), {"n": 1}, f"1|{INT}"),
    *(B("block_scale_interleave", "swizzled", (experts * count,),
        {"n": experts, "rows": rows, "cols": columns}, "whole tiles")
      for experts in (1, 3) for rows, columns, count in (
        (1, 1, 512), (127, 4, 512), (128, 4, 512), (128, 5, 1024), (129, 3, 1024),
        (129, 8, 2048), (256, 9, 3072))),
    B("block_scale_interleave_reverse", "rows", range(0, INT // 8 + 1, 128), {"n": 1, "cols": 8},
      f"128|{INT}"),
    B("block_scale_interleave_reverse", "cols", range(0, INT // 128 + 1, 4), {"n": 1, "rows": 128},
      f"4|{INT}"),
    B("mxfp8_quantize", "k", range(32, INT - 127, 32), {
        "n": 3, "padded_k": lambda k: 32 * cut(k, 32),
        "num_scales": lambda k: tiles(3, cut(k, 32))},
      f"k of at least 1|k = .* multiple of 32|padded_k = .* at most {INT - 128}"),
    B("mxfp8_quantize", "n", range(INT - 127), {"num_scales": lambda n: tiles(n, 3)}),
    B("mxfp8_quantize", "alignment", range(32, 2**20 + 1, 32), {
        "k": 32, "padded_k": lambda size: 32 * cut(size, 32),
        "num_scales": lambda size: tiles(3, cut(size, 32))}),
    *(B("mxfp8_quantize", "padded_k", (padded,), {
        "k": k, "alignment": step, "num_scales": tiles(3, padded // 32)}, ".")
      for k, step, padded in ((96, 32, 96), (96, 64, 128), (128, 64, 128), (160, 64, 192),
                              (160, 96, 192), (192, 96, 192), (224, 96, 288))),
    *(B("mxfp8_quantize", "num_scales", (count,), {
        "n": n, "k": k, "padded_k": k, "sfSwizzleLayout": layout}, ".", ">=0.6.7")
      for layout, n, k, count in (
        (0, 1, 32, 512), (0, 127, 128, 512), (0, 128, 128, 512), (0, 129, 128, 1024),
        (0, 128, 160, 1024), (1, 7, 128, 32), (1, 8, 128, 32), (1, 9, 128, 64), (1, 8, 160, 64),
        (2, 3, 96, 9), (2, 3, 128, 12), (2, 128, 160, 640))),
    B("mxfp8_quantize", "sfSwizzleLayout", (1,), {"num_scales": 32}, ".", ">=0.6.7"),
    B("fp4_quantize", "half", range(8, INT // 2 - 127, 8), {
        "num_scales": lambda half: tiles(3, cut(half, 8)), "n": 3}),
    B("fp4_quantize", "n", range(INT - 127), {"num_scales": lambda n: tiles(n, 4)}),
    B("fp4_quantize", "sfVecSize", (16,)),
    *(B("fp4_quantize", "num_scales", (count,), {
        "n": n, "half": half, "sfVecSize": size, "sfUseUE8M0": size == 32,
        "isSf8x4Layout": is_8x4, "isSfSwizzledLayout": is_tiled}, ".")
      for size, is_tiled, is_8x4, n, half, count in (
        (16, True, False, 1, 8, 512), (16, True, False, 128, 32, 512),
        (16, True, False, 129, 32, 1024), (16, True, False, 128, 40, 1024),
        (32, True, False, 128, 64, 512), (32, True, False, 128, 80, 1024),
        (16, True, True, 8, 32, 32), (16, True, True, 9, 32, 64), (16, True, True, 7, 40, 64),
        (16, False, False, 3, 24, 9), (16, False, True, 3, 24, 9), (32, False, False, 3, 48, 9))),
    B("fp4_batched_quantize", "half", range(8, INT // 2 - 127, 8), {
        "num_scales": lambda half: tiles(3, cut(half, 8)), "n": 3, "b": 1}),
    B("fp4_batched_quantize", "n", range(INT // 2 - 127), {
        "b": 2, "num_scales": lambda n: tiles(n, 3), "half": 24, "scales": 1}, f"{INT}"),
    *(B("fp4_batched_quantize", "num_scales", (count,), {"n": n, "half": half, "scales": 1}, ".")
      for n, half, count in ((1, 8, 512), (128, 32, 512), (129, 32, 1024), (127, 40, 1024))),
    B("fp4_batched_quantize", "scales", (1, 3), {"n": 3}, ".", ">=0.6.11"),
    B("fp4_batched_quantize", "scales", (1,), {"n": 3}, ".", "<0.6.11"),
    # Rows of probabilities: sizes are uint32_t or ints, a grid's second dimension has slices.
    B("softmax", "h", range(1, 8192 * (GRID - 1) + 1), {"n": 1, "workspace_size": INT}),
    B("softmax", "n", range(INT), {"h": 1, "workspace_size": INT}),
    B("softmax", "temperature_val", Floats(0.0), NO_ARRAYS),
    B("softmax", "workspace_size", range(2**20, FAR), {"n": 128, "h": 8192 * 1024}, "1048576"),
    B("softmax", "workspace_size", range(128 * 1025 * 8, FAR), {"n": 128, "h": 8192 * 1024 + 1}),
    B("softmax", "workspace_size", range(2**20, FAR), {"n": 129, "h": 8192 * 1024 + 1}, "1048576"),
    B(DRAWS, "h", range(1, INT), {"n": 1, "r": 1, **NO_ARRAYS}),
    B(DRAWS, "r", range(1, UINT // 24 + 1), {"h": 24, **NO_ARRAYS}, f"1|{UINT}"),
    B(DRAWS, "r", range(UINT // 24 + 1), {"h": 24, "n": 0}, f"{UINT}"),
    B(DRAWS, "n", range(INT), {"h": 1, "r": 1, **NO_ARRAYS}),
    B(DRAWS, "n", range(6), {"r": 5, "h": 24, "maybe_indices": None}, "maybe_indices"),
    # Outputs of one subsequence each, of which there are 2**32.
    B(DRAWS[-1], "n", range(2**29 + 1), {"h": 24, "r": 1}, "random numbers"),
    B(DRAWS[-1], "n", range(2**27 + 1), {"h": 32, "r": 1}, "random numbers"),
    B(("top_k_sampling_from_probs", *TOP_K), "top_k_val", range(1, INT), NO_ARRAYS),
    B(("top_p_sampling_from_probs", "top_k_top_p_sampling_from_probs"), "top_p_val", Floats(0.0),
      NO_ARRAYS),
    B("top_k_top_p_sampling_from_probs", "top_k_val", Floats(1, INT - 1), NO_ARRAYS),
    # Buckets' counts of 4 and sums of 8 bytes, 384 bytes, and two buffers of a 32nd of the row.
    *(B("top_p_renorm_probs", "workspace_size", range(most, FAR), {
        "n": n, "h": h, "is_deterministic": is_deterministic}, f"{most} bytes", ">=0.6.7")
      for n, h, is_deterministic, most in (
        (1, 2047, True, 0), (1, 2048, True, 27136), (1, 2048, False, 18944),
        (1, 8191, True, 27136), (1, 8224, True, 29184), (2, 8192, True, 54016),
        (3, 8224, True, 87296))),
    B("top_p_renorm_probs", "top_p_val", Floats(0.0, 1.0), NO_ARRAYS, "."),
    B("top_p_renorm_probs", "top_p_val", Floats(4.0), NO_ARRAYS, "."),
    B("min_p_sampling_from_probs", "min_p_val", Floats(0.0), NO_ARRAYS),
    *(B((*DRAWS, CHAIN), f"{of}s", (1, 4), {"n": 4}, ".", ">=0.7.2") for of in ("seed", "offset")),
    B("top_p_renorm_probs", "h", range(1, INT), {"n": 1, "workspace_size": INT}),
    B("top_p_renorm_probs", "n", range(GRID), {"h": 24, "workspace_size": INT}),
    B("top_p_renorm_probs", "n", range(INT // 65536 + 1), {"h": 65536, "workspace_size": INT},
      f"{INT}"),
    B(TOP_K, "h", range(1, INT), {"n": 1}),
    B(TOP_K, "n", range(INT), {"h": 1}),
    B(TOP_K, "workspace_size", range(2**20, FAR)),
    B(CHAIN, "h", range(1, INT), {"n": 1, "s": 1}),
    B(CHAIN, "n", range(INT), {"h": 1, "s": 1}),
    B(CHAIN, "s", range(1, FAR), {"n": 1}),
    # topk.cuh: what is chosen is counted in a uint32_t, in whose tables a block has 2048 of.
    B(TOP_KS[0], "d", range(5, INT), {"n": 1}, "."),
    B(TOP_KS[1:], "d", range(1, INT), {"n": 1, "m": lambda d: max(d, 0)}),
    B(TOP_KS, "n", range(858993459 + 1), {"top_k": 5}, f"{UINT - 1}"),
    B(TOP_KS, "n", range(INT), {"top_k": 1, "d": 8}),
    B(TOP_KS, "workspace_size", range(2**20, FAR)),
    B(TOP_KS[0], "top_k", range(INT), {"n": 1, "d": INT - 1}),
    B(TOP_KS[1:], "top_k", range(INT), {"n": 1}),
    *(B(TOP_KS, "top_k", range(2049), {"n": 1, "d": 4096, "m": 4096, option: on}, "2048",
        ">=0.6.10")
      for option, on in (("tie_break", 1), ("dsa_graph_safe", True))),
    B(TOP_KS[0], "top_k", range(2049), {"n": 1, "d": 4096, "sorted_output": True}, "2048",
      ">=0.6.8"),
    B(TOP_KS[1], "b", range(1, FAR), {"n": 4}, "1|or less"),
    B(TOP_KS[1], "n", range(5), {"b": 4, "maybe_row_to_batch": None}, "maybe_row_to_batch"),
    B(TOP_KS[1], "m", range(24, FAR), {"d": 24}, ".", "<0.6.18"),
    B(TOP_KS[1], "m", range(5, FAR), {"d": 24, "page_size": 5}, ".", ">=0.6.18"),
    B(TOP_KS[1], "m", range(5, FAR), {"d": 25, "page_size": 5}, ".", ">=0.6.18"),
    B(TOP_KS[1], "page_size", range(1, INT // 2 + 1), releases=">=0.6.18"),
    B(TOP_KS, "tie_break", range(3), releases=">=0.6.9"),
    # One token of each has a block; groups of as many experts, a warp for each.
    B("fused_topk_deepseek", "n", range(INT), {"routing_replay_out": None}),
    B("fused_topk_deepseek", "most_tokens", range(5, FAR), {"n": 5}, ".", ">=0.6.8"),
    B("fused_topk_deepseek", "experts", range(16, 257, 8),
      {"n_group": 8, "topk_group": 1, "topk": 2, "k": 2}, "."),
    B("fused_topk_deepseek", "experts", range(1, 129), {
        "n_group": 1, "topk_group": 1, "topk": 1, "k": 1}, "."),
    B("fused_topk_deepseek", "experts", range(8, 385), {
        "n_group": 1, "topk_group": 1, "topk": 8, "k": 8}, "."),
    B("fused_topk_deepseek", "experts", range(7, 129), {
        "n_group": 1, "topk_group": 1, "topk": 7, "k": 7}, "."),
    B("fused_topk_deepseek", "topk_group", range(1, 5), {
        "experts": 64, "n_group": 8, "topk": 8, "k": 8}, "."),
    B("fused_topk_deepseek", "topk_group", range(1, 3), {
        "experts": 64, "n_group": 2, "topk": 8, "k": 8}, "."),
    B("fused_topk_deepseek", "topk", range(1, 9), {
        "experts": 64, "n_group": 4, "topk_group": 1, "k": same}, "."),
    B("fused_topk_deepseek", "topk", range(1, 5), {
        "experts": 32, "n_group": 8, "topk_group": 1, "k": same}, "."),
    B("fused_topk_deepseek", "n_group", (1, 2, 4, 8), {
        "experts": 64, "topk_group": 1, "topk": 8, "k": 8}, "."),
    B("fused_topk_deepseek", "routed_scaling_factor", Floats(0.0)),
    B("seq_chunk_cumsum", "num_logical_chunks", range(INT)),
    B("seq_chunk_cumsum", "num_seqs", range(INT - 1024), {"tile_state": None}),
    B("seq_chunk_cumsum", "chunk_size", range(1, INT)),
    # Eight bytes for each tile of 256 sequences that a scan needs, and for each thread of a warp.
    *(B("seq_chunk_cumsum", "bytes", range(most, FAR), {"num_seqs": count})
      for count, most in ((1023, 0), (1024, 288), (1025, 296), (1280, 296), (1281, 304))),
    # Products of SM100: a scale for 16 of the one (a byte has two), and for 32 of the other.
    B("fp4_gemm", "half", range(16, INT // 2, 16), {
        "scales_a": lambda half: tiles(3, cut(half, 8)),
        "scales_b": lambda half: tiles(32, cut(half, 8))}),
    B("fp4_gemm", "m", range(INT), {"scales_a": lambda m: tiles(m, 6)}),
    B("fp4_gemm", "n", range(0, INT, 32), {"scales_b": lambda n: tiles(n, 6)}),
    B("mxfp8_gemm", "k", range(32, INT, 32), {
        "scales_a": lambda k: tiles(3, cut(k, 32)), "scales_b": lambda k: tiles(32, cut(k, 32))}),
    B("mxfp8_gemm", "m", range(INT), {"scales_a": lambda m: tiles(m, 3)}),
    B("mxfp8_gemm", "n", range(0, INT, 32), {"scales_b": lambda n: tiles(n, 3)}),
    *(B("fp4_gemm", "scales_a", (count,), {"m": m, "half": half,
        "scales_b": tiles(32, cut(half, 8))}, ".")
      for m, half, count in ((1, 16, 512), (128, 32, 512), (129, 32, 1024), (128, 48, 1024))),
    *(B("fp4_gemm", "scales_b", (count,), {"n": n, "half": half,
        "scales_a": tiles(3, cut(half, 8))}, ".")
      for n, half, count in ((32, 16, 512), (128, 32, 512), (160, 32, 1024), (128, 48, 1024))),
    *(B("mxfp8_gemm", "scales_a", (count,), {"m": m, "k": k, "scales_b": tiles(32, cut(k, 32))},
        ".")
      for m, k, count in ((1, 32, 512), (128, 128, 512), (129, 128, 1024), (128, 160, 1024))),
    *(B("mxfp8_gemm", "scales_b", (count,), {"n": n, "k": k, "scales_a": tiles(3, cut(k, 32))},
        ".")
      for n, k, count in ((32, 32, 512), (128, 128, 512), (160, 128, 1024), (128, 160, 1024))),
    B(("bf16_gemm", "bmm_bf16"), "k", range(8, INT, 8), {"b": 1, "m": 1, "n": 8}),
    B(("bf16_gemm", "bmm_bf16"), "n", range(0, INT, 8), {"b": 1, "m": 1, "k": 8}),
    B(("bf16_gemm", "bmm_bf16"), "m", range(INT), {"b": 1, "n": 8, "k": 8}),
    B("bmm_bf16", "b", range(INT), {"m": 1, "n": 8, "k": 8}),
    B("bmm_bf16", "m", range(INT // 16), {"b": 2, "n": 8, "k": 16}, "several|2147483647"),
    B("bmm_bf16", "n", range(0, INT // 16, 8), {"b": 2, "m": 1, "k": 16}, "."),
    B("bmm_bf16", "m", range((INT - 1) // 24 + 1), {"b": 2, "n": 24, "k": 8}, "."),
    B("bmm_mxfp8", "b", range(INT), {
        "m": 128, "n": 128, "k": 32, "scales_a": lambda b: 512 * b, "scales_b": lambda b: 512 * b}),
    B("bmm_mxfp8", "k", range(32, INT, 32), {
        "b": 1, "m": 1, "n": 32, "scales_a": lambda k: tiles(1, cut(k, 32)),
        "scales_b": lambda k: tiles(32, cut(k, 32))}),
    B("bmm_mxfp8", "m", range(INT), {
        "b": 1, "n": 32, "k": 32, "scales_a": lambda m: tiles(m, 1), "scales_b": 512}),
    B("bmm_mxfp8", "m", range(0, INT // 128, 128), {
        "b": 2, "n": 128, "k": 32, "scales_a": lambda m: tiles(2 * m, 1), "scales_b": 1024}, "."),
    B("bmm_mxfp8", "n", range(0, INT, 32), {
        "b": 1, "m": 1, "k": 32, "scales_b": lambda n: tiles(n, 1), "scales_a": 512}),
    B("bmm_mxfp8", "n", range(0, INT // 128, 128), {
        "b": 2, "m": 128, "k": 32, "scales_b": lambda n: tiles(2 * n, 1), "scales_a": 1024}, "."),
    B("tgv_gemm", "k", range(8, INT // 16, 8), {"m": 8, "n": 1}, "."),
    B("tgv_gemm", "m", range(0, INT // 16, 8), {"k": 8, "n": 1}, "."),
    B("tgv_gemm", "n", range(INT // 16), {"k": 8, "m": 8}, "."),
    B("tgv_gemm", "n", range(INT // 32), {"k": 16, "m": 8}, "."),
    B("tgv_gemm", "n", range((INT // 2 - 1) // 24 + 1), {"k": 8, "m": 24}, "."),
    B(SM100, "tactic", range(-1, FAR)),
    B(SM100[:-1], "workspace_size", range(32 * 2**20, FAR)),
    # fused_topk_topp.cu of tokenspeed-kernel: 128 tokens are sorted, a grid's y counts rows,
    # offsets are ints; a size is a float on the way to the workspace's.
    B(OF_BOTH, "h", range(129, 2**24 + 1), {"n": 1, "workspace_size": UINT}),
    B(OF_BOTH, "n", range(GRID), {"h": 129, "workspace_size": 2 * UINT}),
    B(OF_BOTH, "n", range(INT // 65536 + 1), {"h": 65536, "workspace_size": 2 * UINT},
      f"{INT} elements"),
    # kvcacheio_transfer.cu: 4, 8 or 16 bytes at a time, counted in an int, as tokens are.
    B(BY_TOKEN, "item", range(0, INT, 4)),
    B(BY_HEAD, "part", range(0, INT, 4), {"head_num": 1, "page_size": 1, "pages": 1}),
    B([*BY_TOKEN, BY_HEAD], "n", range(INT)),
    B(BY_HEAD, "head_num", range(1, FAR), {"part": 0}),
    B(BY_HEAD, "page_size", range(1, FAR), {"part": 0}),
    B([*BY_TOKEN[2:], BY_HEAD], "layer_id", range(3), {"layers": 3}, "a layer of|0 or more"),
    B([*BY_TOKEN, BY_HEAD], "num_warps_per_block", range(1, 33)),
    B([*BY_TOKEN, BY_HEAD], "block_quota", range(1, INT)),
    # routing_flash.cu: these are compiled; offsets of logits are ints.
    B("softmax_topk_flash", "experts", (384, 576, 768, 896), {"k": 8}),
    B("softmax_topk_flash", "k", range(385), {"experts": 384}),
    B("softmax_topk_flash", "k", range(0, 577, 4), {"experts": 576, "num_experts_real": 8}),
    B("softmax_topk_flash", "scaling_factor", Floats(0.0)),
    B(OF_V4, "routed_scaling_factor", Floats(0.0)),
    B("softmax_topk_flash", "num_experts_real", range(1, 384), {"experts": 384},
      "fewer than|1 or more"),
    B("softmax_topk_flash", "k", range(0, 129, 4),
      {"experts": 576, "num_experts_real": 8, "renormalize": True}, "128|576"),
    B(OF_V4, "experts", (256, 384)),
    B([*OF_V4, "softmax_topk_flash"], "n", range(INT // 384 + 1), {"experts": 384},
      f"{INT} elements"),
    B(OF_V4[1], "vocab", range(INT // 6 + 1), {"n": 0}, f"{INT} elements"),
    # gptq_marlin_repack.cu: tiles of 16 x 64, offsets in ints.
    B("gptq_marlin_repack", "num_bits", range(4, 9, 4), {
        "words": lambda bits: 2 * bits // 2, "columns": lambda bits: 64 * bits // 2}),
    B("gptq_marlin_repack", "n", range(0, INT // 4 + 1, 64), {
        "columns": lambda size: 2 * size, "tiles": 2, "words": 4}, f"64|{INT} elements"),
    B("gptq_marlin_repack", "words", (4,), {"tiles": 2}, "num_bits / 2 rows"),
    B("gptq_marlin_repack", "columns", (128,), {"n": 64}, "num_bits / 2 columns"),
    # moe_align_kernel.cu: 16 bytes at a time, numbers of routes in an int.
    B("moe_align_block_size", "most", range(100, INT - 3, 4), {
        "tokens": 5, "k": 3, "num_experts": 12, "block_size": 8, "blocks": INT},
      "4|or more|at most"),
    B("moe_align_block_size", "num_experts", range(2, 8193), {
        "most": INT - 4, "blocks": INT}),
    B("moe_align_block_size", "block_size", range(1, INT - 3), {
        "tokens": 1, "k": 1, "most": INT - 4, "blocks": INT}, "or more"),
    B("moe_align_block_size", "blocks", range(13, FAR), {
        "tokens": 5, "k": 3, "most": 100, "block_size": 8}, "or more"),
    B("moe_align_block_size", "starts", range(8193, FAR), says="bytes or more"),
    *(B("moe_align_block_size", one, range(1, 13), {other: 1, "most": 96, "blocks": 12},
        "or more|1") for one, other in (("tokens", "k"), ("k", "tokens"))),
    # moe_wna16_marlin.cuh: tiles of 64 x 128 at least, and what it counts in ints.
    B(WNA16[:2], "k", range(64, INT // 128, 64), {"n": 128}, f"64|{INT - 1}"),
    B(WNA16[:2], "n", range(0, INT // 64, 128), {"k": 64}, f"128|{INT - 1}"),
    B(WNA16[:2], "experts", range(INT // 16), {"k": 64, "n": 128, "m": 0, "routes": 0},
      f"{512 * (INT - 1)}"),
    B(INT4, "k", range(64, INT // 128, 64), {"n": 128, "groups": lambda k: max(k // 64, 2)},
      f"64|{INT - 1}"),
    B(INT4, "n", range(0, INT // 128, 128), says=f"128|{INT - 1}"),
    B(INT4, "experts", range(INT // 32), {"n": 128, "m": 0, "routes": 0}, f"{512 * (INT - 1)}"),
    B(INT4, "groups", (2, 4, 8), {"k": 256}, "32, 64 or 128 rows|of at least 2"),
    *(B(those, "most", range(2**22), {"k": 4096, "n": 8192, "blocks": INT, **more}, f"{INT - 1}")
      for those, more in ((WNA16[:2], {}), (INT4, {"groups": 64}))),
    B(WNA16, "routes", (8,), {"m": 4, "top_k": 2}, "m \\* top_k rows"),
    B(WNA16, "blocks", range(12, FAR), {"most": 96, "moe_block_size": 8}, "or more"),
    B(WNA16, "moe_block_size", (8, 16, 32, 48, 64), {"blocks": 100},
      "8 or a mult|of 8|64 or less|8 or more"),
    B(WNA16, "locks", range(4, FAR), says="bytes or more"),
    B(WNA16, "sums", range(65536, FAR), says="bytes or more"),
    # What the library's own function told for these rows and tokens.
    *(B(OF_BOTH, "workspace_size", range(most, FAR), {"n": n, "h": h})
      for n, h, most in WORKSPACES),
]  # fmt: skip


def bounds_of(row: Row, release: str) -> list[Bound]:
    return [
        bound for bound in BOUNDS
        if row.name in ((bound.ops,) if isinstance(bound.ops, str) else bound.ops)
        and (not bound.releases or is_in(release, bound.releases))
    ]  # fmt: skip


def forms(name: str) -> Iterator[tuple[Row, list[Bound]]]:
    """The rows of an op, and the bounds of each."""
    for row in OPS[name].rows:
        release = next(release for release in known_releases() if fits(row, release))
        yield row, bounds_of(row, release)


def axes_of(row: Row) -> set[str]:
    return {axis for arg in row.tensors for axis in arg.axis_variables}


each_op = pytest.mark.parametrize("name", OPS)


@each_op
def test_values_at_and_beyond_a_bound(name):
    """Of each form of the op."""
    for row, bounds in forms(name):

        def judge(changes, row=row):
            error = refusal_of(row, described(row, **changes))
            assert error is None or error.op == name
            return error

        assert not [told for bound in bounds for told in misjudged(row, bound, judge)], row.releases


@each_op
def test_every_limit_of_a_row_has_a_bound(name):
    for row, bounds in forms(name):
        assert not [*unbounded(row, bounds)], row.releases


# Majors of the GPUs that ops were written for, by the instructions in their sources; others: any.
HOPPER, FP8_UNITS, LATER, BLACKWELL = (9,), (8, 9, 10, 11, 12), (9, 10, 11, 12), (10, 11, 12)
MAJORS = {
    **dict.fromkeys(("gdn_prefill", "fp8_quantize_1x128"), HOPPER),
    "bmm_fp8": FP8_UNITS,
    **dict.fromkeys((*TINY, "block_scale_interleave", "block_scale_interleave_reverse"), LATER),
    **dict.fromkeys(("mxfp8_quantize", "nvfp4_kv_quant", "fp4_quantize", "fp4_batched_quantize",
                     "fp4_gemm", "mxfp8_gemm", "bmm_mxfp8"), BLACKWELL),
    **dict.fromkeys(("bf16_gemm", "bmm_bf16", "tgv_gemm"), (10,)),
    **dict.fromkeys((OF_BOTH, *BY_TOKEN, BY_HEAD, *OF_V4, "softmax_topk_flash",
                     "gptq_marlin_repack", "moe_align_block_size", *WNA16), (9, 10)),
}  # fmt: skip
GPUS = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]


@each_op
def test_gpus_that_a_row_is_for(name):
    majors = MAJORS.get(name)
    for row in OPS[name].rows:
        refused = [gpu for gpu in GPUS if row.other_gpus(gpu)]
        assert refused == [gpu for gpu in GPUS if majors and gpu[0] not in majors]
        assert not row.other_gpus(None)  # the CPU's reference


def test_own_scratch_of_a_kernel_that_works_with_any():
    rows = [row for op in OPS.values() for row in op.rows]
    found = {
        (row.name, arg.name): scratch_bytes(arg, parse_device("cpu"))
        for row in rows for arg in row.tensors if arg.any_size
    }  # fmt: skip
    assert found == {("bmm_fp8", "workspace_buffer"): 221184}


# Ops whose tables say how many there are of what is bounded, and those that only take megabytes.
NOT_CALLED = {*APPENDS, *QUANTISE[1:], "seq_chunk_cumsum", "segment_packbits", "gdn_prefill",
              *ROUTERS}  # fmt: skip


def calls_at(row: Row, bound: Bound) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Values at a bound, and what is said of calls with them that are small and have a result."""
    own = [arg for arg in row.tensors if not arg.is_scratch]
    if isinstance(bound.values, Floats) or bound.name in ("workspace_size", "bytes"):
        return
    for value in bound.taken:
        changes = bound.changes(value)
        descs = described(row, **changes)
        there = [(arg, descs[arg.name]) for arg in own if descs.get(arg.name) is not None]
        is_small = sum(desc.span_bytes for _, desc in there) <= 1 << 18
        if is_small and any(desc.numel for arg, desc in there if arg.writes):
            yield value, changes


@pytest.mark.parametrize("name", [name for name in OPS if name not in NOT_CALLED])
def test_results_at_a_bound(name, rng):
    """On the CPU, beside the definition."""
    row, bounds = next(form for form in forms(name) if form[0] is OPS[name].row)
    numbers = {arg.name for arg in row.given} - {arg.name for arg in row.tensors}
    scratch = {arg.name for arg in row.tensors if arg.is_scratch}
    for value, changes in itertools.chain.from_iterable(calls_at(row, bound) for bound in bounds):
        sizes, dtypes, scalars = (
            {key: changes[key] for key in changes.keys() & keys}
            for keys in (axes_of(row), row.dtypes, numbers)
        )
        case = make_case(
            row, {**inputs_of(row).small, **sizes}, {**default_dtypes(row), **dtypes}, rng,
            without=scratch | {key for key in changes if changes[key] is None}, **scalars,
        )  # fmt: skip
        assert check_on(CPU, case) <= 1, (value, changes)
        values = {**case.arrays, **case.scalars}
        wanted = DEFINITIONS[row.formula](values if row.formula in MOVES else as_inputs(values))
        for result, right in wanted.items():
            found = case.expected[result]
            found = found[0] if isinstance(found, tuple) else found.value()
            np.testing.assert_allclose(found, right, 1e-6, 1e-6, err_msg=f"{changes}: {result}")
