"""What ops give against their formulas, of sizes and options at which kernels change their ways.

A table for all families; on the CPU here, and (tests/gpu) on a GPU, which has more sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fi_ffi.ops.call.notation import FUNCTIONS
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table import norm

from tests.helpers.calls import EVERY_CALL, HIDDEN, edges, padded
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import check_on, check_replayed, needs
from tests.helpers.inputs import inputs_of
from tests.helpers.inputs.page import page_tables
from tests.helpers.inputs.sampling import probabilities
from tests.helpers.limits import limits
from tests.helpers.rope_calls import ANGLES, APPLY, COS_SIN, LLAMA_31, QUANTISE
from tests.helpers.sampling_calls import ARRAYS, DRAWING, SAMPLERS, SEEDS, run

Options = Mapping[str, Any]
# Tables of a call, by what makes them of its sizes.
Tables = Callable[[np.random.Generator, Mapping[str, int]], dict[str, Any]]

SCRATCH = ("workspace_buffer", "workspace", "row_states_buffer", "maybe_row_states_buffer")
FILTERED = ("maybe_temperature_arr", *ARRAYS)
STARTS = ("maybe_row_starts", "maybe_page_table_row_starts")
NORMS = tuple(dict.fromkeys(row.name for row in norm.ROWS))
GATED = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
DIT = (
    "fused_dit_gate_residual_layernorm_gamma_beta", "fused_dit_residual_layernorm_scale_shift",
    "fused_dit_gate_residual_layernorm_scale_shift",
)  # fmt: skip
TOP_K = ("top_k_renorm_probs", "top_k_mask_logits")
WHOLE_ROWS = ("softmax", *TOP_K, "top_p_renorm_probs")
TOP_KS = PLAIN, PAGES, RAGGED = (
    "radix_topk", "radix_topk_page_table_transform", "radix_topk_ragged_transform",
)  # fmt: skip
ROUTERS = tuple(name for name, op in OPS.items() if op.row.module == "dsv3_router_gemm")
CHAIN = "chain_speculative_sampling"
MERGES = ("merge_state", "merge_state_in_place", "merge_states")
APPENDS = ("append_paged_kv_cache", "append_paged_mla_kv_cache")
SLOTS = "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping"
# What is moved, or quantised by a rule that is exact, has no bound: it is the same bits.
BIT_FOR_BIT = {
    "packbits", "segment_packbits", "concat_mla_k", "block_scale_interleave", "mxfp8_quantize",
    "block_scale_interleave_reverse", "fp4_quantize", "nvfp4_kv_quant", *APPENDS, SLOTS,
}  # fmt: skip
BOTH = (False, True)


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of these."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


@dataclass(frozen=True)
class Line:
    """Calls of some ops: these sizes, more of them on a GPU, each with these options.

    `dtypes` are the first of each variable, or with `every_dtype` all that go together.
    """

    ops: Sequence[str]
    axes: str
    sizes: Sequence[tuple[int, ...]]
    each: Sequence[Options] = ({},)
    on_gpu: Sequence[tuple[int, ...]] = ()
    every_dtype: bool = False
    tables: Tables | None = None

    def calls(self, is_gpu: bool) -> Iterator[tuple[dict[str, int], Options]]:
        for numbers in (*self.sizes, *(self.on_gpu if is_gpu else ())):
            for options in self.each:
                yield dict(zip(self.axes.split(), numbers, strict=True)), options


def lines_of(*lengths: int) -> list[tuple[int]]:
    return [(length,) for length in lengths]


def _segments(*lengths: Sequence[int]) -> list[Line]:
    """Empty ones, whole bytes, some bits, and longer than a block packs at a time."""
    return [
        Line(["segment_packbits"], "n b", [(sum(each), len(each))],
             grid(bitorder=("big", "little")), tables=lambda rng, sizes, each=each: {  # type: ignore[misc]
                 "input_indptr": np.concatenate([[0], np.cumsum(each)]).astype(np.int32)})
        for each in lengths
    ]  # fmt: skip


def _flat_and_peaked(spread: float) -> Tables:
    return lambda rng, sizes: {
        "probs": probabilities(rng, sizes.get("r", sizes["n"]), sizes["h"], spread=spread)
    }


def _strange_rows(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Two values only, one token only, and a sum that is not 1."""
    n, h = sizes["n"], sizes["h"]
    probs = probabilities(rng, n, h)
    probs[::3] = rng.choice([0.5, 1.0], (len(probs[::3]), h)) / h
    probs[1::3] = np.eye(h)[rng.integers(0, h, len(probs[1::3]))]
    return {"probs": 0.9 * probs}


def _ties(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A few values only, and one."""
    rows = rng.integers(-2, 3, (sizes["n"], sizes["d"])).astype(float)
    rows[-1] = 1
    return {"input": rows}


def _extremes(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Infinities, zeros of both signs, large numbers and small ones."""
    values = [np.inf, -np.inf, 0.0, -0.0, 65504, -65504, 1.0, -1.0, 2.0**-14]
    return {"input": rng.choice(values, (sizes["n"], sizes["d"]))}


def _windows(starts: Sequence[int]) -> Tables:
    lengths = [0, 1, 9, 10, 11, 63, 64, 0, 5, 10]
    return lambda rng, sizes: {
        "lengths": np.array(lengths), "maybe_row_starts": np.array(starts),
        "maybe_page_table_row_starts": np.array(starts),
    }  # fmt: skip


def _quantised(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Pieces of zeros, one element, the least and the largest numbers, and signs."""
    rows = np.zeros((8, 256))
    rows[1, 200] = -3
    rows[2] = np.where(rng.random(256) < 0.5, -1, 1)
    rows[3] = 8e37  # below 2^126: docs/gemm.md
    rows[4, ::2], rows[4, 1::2] = 2.0**-110, -(2.0**-112)
    rows[5] = np.linspace(-7, 7, 256)
    rows[6, :128], rows[6, 128:] = 1e-20, 1e20
    return {"input": rows}


def _far_sums(offset: float, spread: float) -> Tables:
    """Logarithms far from 0, and so far apart that a set counts for nothing."""
    return lambda rng, sizes: {
        "s": rng.standard_normal((sizes["n"], sizes["num_index_sets"], 3)) * spread + offset
    }


_WITHOUT_ALL = {"without": (*SEEDS, *FILTERED, "maybe_indices", *SCRATCH)}
_VOCABULARIES = (1, 2, 3, 5, 31, 128, 1000, 1024, 4096, 4099, 32000)
# On an H100 a block has room for 57592 floats, or twice as many of two bytes.
_FILTERS = (1, 2, 3, 31, 100, 128, 1000, 2047, 2048, 2049, 4096, 4099, 32000)
_LARGE = (57344, 57593, 115016, 115185, 128256, 128257, 262144, 1000000)
# Rows that a block takes, and (on an H100) rows that blocks share: above 32768 floats of few
# rows, or 16384 of two bytes, and with more than 2048 to choose.
TOP_K_SIZES = [(1, 1), (2, 1), (31, 5), (128, 127), (1000, 10), (4096, 64), (4099, 1), (5000, 3000)]
TOP_K_LARGE = [
    (16384, 2048), (16385, 2048), (32768, 100), (32769, 2049), (65536, 512), (128256, 2048),
    (131072, 4096), (262144, 1), (1000000, 2048), (1048576, 70000),
]  # fmt: skip
_HEAD_COUNTS = ((1, 1), (4, 1), (3, 5), (32, 8), (2, 0))
# What is rotated of a head, by whether neighbours are pairs.
_PARTS = {
    False: ((64, 16), (64, 48), (128, 16), (128, 96), (256, 64), (256, 240), (512, 32), (512, 480)),
    True: ((64, 8), (64, 40), (128, 8), (128, 120), (256, 8), (512, 16), (512, 80)),
}
# Head sizes that go to the kernel that quantises.
_WIDE = [(96, 96), (96, 32), (80, 64), (192, 64), (192, 128), (576, 64), (40, 32), (1024, 1024),
         (112, 96), (136, 32)]  # fmt: skip
_YARN = {"factor": 4.0, "low": 3.0, "high": 9.5, "attention_factor": 1.2}
_FP8 = {"output_quant_scale": 3.5, "v_quant_scale": 0.7}
VIDEO = {"ppf": 3, "pph": 4, "ppw": 7}
_CHANNELS = ("num_frame_channels", "num_height_channels", "num_width_channels")
_KV = [{}, {"kv_layout": "HND"}]
_QUANTISING = "nnz num_qo_heads num_kv_heads rope_dim no_rope_dim page_size b max_seq_len"

LINES: dict[str, Line] = {
    "norm": Line(NORMS, "n k h", [(7, 3, h) for h in HIDDEN], every_dtype=True,
                 on_gpu=[(n, 3, h) for h in HIDDEN for n in (1, 130)]),
    "eps": Line(NORMS, "n k h", [(17, 2, 512)], grid(eps=(0.0, 1e-5, 0.5, 3), enable_pdl=BOTH)),
    # One vector, a block that is no warp, the first after 1024 threads with a vector each, and
    # what models have.
    "gated": Line(GATED, "d n", [(d, n) for d in (8, 24, 344, 1024, 8184, 8192, 8200, 11008, 14336,
                                                  28672) for n in (1, 7)] + [(8, 1000)],
                  grid(enable_pdl=BOTH), on_gpu=[(8, 70_000)], every_dtype=True),
    "dit": Line(DIT, "n num_rows", [(1, 1), (3, 2), (1, 40), (40, 1)],
                on_gpu=[(1, 3000), (3000, 1)]),
    "dit options": Line(DIT, "n num_rows", [(2, 5)], grid(
        epsilon=(0.0, 1e-5, 0.7), without=((), ("input_sf_scale",), ("residual",)))),
    "dit far": Line(DIT, "n num_rows", [(2, 5)], tables=lambda rng, sizes: {
        "input": rng.standard_normal((2, 5, 3072)) + 8}),
    "video": Line(["fused_qk_rmsnorm_rope"], "num_heads_q num_heads_k num_heads_v n head_dim",
                  [(*heads, 90, dim) for dim in (64, 128, 256)
                   for heads in ((1, 1, 1), (24, 24, 24), (32, 8, 8), (2, 5, 32))],
                  [VIDEO | _FP8 | {"interleave": way} for way in BOTH], every_dtype=True),
    "video options": Line(
        ["fused_qk_rmsnorm_rope"], "num_heads_q num_heads_k num_heads_v n head_dim",
        [(4, 3, 2, 100, 128)],
        [VIDEO | _FP8 | yarn | more for yarn in ({}, _YARN, _YARN | {"high": 3.0})
         for more in grid(interleave=BOTH, is_qk_norm=BOTH, eps=(1e-6, 0.5), base=(1e4, 100.0))],
        every_dtype=True),
    # All of a head for one direction, as even as can be, and as uneven.
    "channels": Line(
        ["fused_qk_rmsnorm_rope"], "num_heads_q num_heads_k num_heads_v n head_dim",
        [(4, 3, 2, 100, 128)],
        [VIDEO | dict(zip(_CHANNELS, each, strict=True)) | {"interleave": way} for way in BOTH
         for each in ((128, 0, 0), (0, 128, 0), (0, 0, 128), (44, 42, 42), (2, 6, 120))]),
    # One patch, rows and columns of them; several in a batch, the last of them cut off.
    "videos": Line(
        ["fused_qk_rmsnorm_rope"], "num_heads_q num_heads_k num_heads_v n head_dim",
        [(2, 2, 2, n, 64) for n in (1, 7, 800)],
        [dict(zip(VIDEO, each, strict=True)) for each in (
            (1, 1, 1), (21, 1, 1), (1, 30, 1), (1, 1, 100), (2, 15, 26))]),
    # The kernel keeps the frequencies of the last call on a device.
    "numbers that change": Line(
        ["fused_qk_rmsnorm_rope"], "num_heads_q num_heads_k num_heads_v n head_dim",
        [(4, 3, 2, 100, 128)] * 2 + [(2, 0, 0, 50, 128), (0, 3, 0, 50, 128), (0, 0, 2, 50, 128)],
        [VIDEO, VIDEO | {"base": 500.0}, VIDEO | _YARN]),
    # From one block to more than a thread block has at a time, 2048 elements.
    "caches of 4 bits": Line(["nvfp4_kv_dequant"], "n blocks", [
        (1, 1), (7, 3), (3, 8), (5, 127), (2, 128), (3, 129), (2, 1000), (700, 8),
        (2, 48 * 1024 - 4)], every_dtype=True),
    "to 4 bits": Line(["nvfp4_kv_quant"], "n blocks", [(1, 1), (5, 3), (2, 129)], every_dtype=True),
    "tiles": Line(["block_scale_interleave"], "n rows cols", [
        (1, 1, 1), (2, 128, 4), (3, 129, 5), (1, 31, 3), (2, 300, 64), (1, 1000, 1030), (40, 7, 9)],
        every_dtype=True),
    "tiles back": Line(["block_scale_interleave_reverse"], "n rows cols", [
        (1, 128, 4), (3, 256, 12), (2, 1024, 1028)]),
    # Every head size, and grids of one and of many heads.
    "slots": Line([SLOTS], "nnz num_pages page_size num_kv_heads head_dim", [
        (1, 1, 1, 1, 64), (7, 3, 5, 3, 128), (40, 4, 16, 8, 256), (9, 2, 64, 2, 512)],
        grid(kv_layout=("NHD", "HND")), every_dtype=True),
    "mxfp8": Line(["mxfp8_quantize"], "n k", [(1, 32), (7, 96), (130, 64), (3, 1024), (9, 160)],
                  grid(sfSwizzleLayout=(0, 1, 2), alignment=(32, 96, 128)), every_dtype=True),
    "fp4": Line(["fp4_quantize"], "n half", [(1, 16), (7, 48), (130, 32), (3, 512)], [
        numbers | {"isSfSwizzledLayout": swizzled, "isSf8x4Layout": of_8}
        for swizzled, of_8 in ((True, False), (True, True), (False, False))
        for numbers in ({}, {"sfUseUE8M0": True, "without": ("globalScale",)})], every_dtype=True),
    "fp4 over its scale": Line(["fp4_quantize"], "n half", [(7, 48)], [
        {"isGlobalScaleInversed": True}],
        tables=lambda rng, sizes: {"globalScale": np.array([0.02])}),
    "concatenated": Line(["concat_mla_k"], "n num_heads nope_dim rope_dim",
                         [(n, 128, 128, 64) for n in (1, 3, 4, 5, 257)], every_dtype=True),
    # A byte and its neighbours, a block of 2048 bits, several.
    "bits": Line(["packbits"], "n", lines_of(1, 7, 8, 9, 63, 2040, 2047, 2048, 2049, 4096, 10_001,
                                             1 << 17), grid(bitorder=("big", "little"))),
    **{f"segments {i}": line for i, line in enumerate(_segments(
        [1], [0], [0, 0, 5, 0], [8, 16, 0, 3], [2048, 2049, 2047, 1, 9], [10_001, 5, 70_000],
        [*range(300)]))},
    "heads": Line(APPLY, "head_dim rotary_dim num_qo_heads num_kv_heads nnz max_seq_len",
                  [(dim, dim, *heads, 9, 70) for dim in (64, 128, 256, 512)
                   for heads in _HEAD_COUNTS], grid(interleave=BOTH), every_dtype=True),
    "tokens": Line(APPLY, "nnz head_dim rotary_dim max_seq_len",
                   [(n, 128, 128, 70) for n in (1, 130, 300)],
                   grid(interleave=BOTH), on_gpu=[(20_000, 128, 128, 70)], every_dtype=True),
    **{f"parts of heads {way}": Line(
        [COS_SIN], "head_dim rotary_dim nnz max_seq_len",
        [(*each, 9, 70) for each in _PARTS[way]], [{"interleave": way}]) for way in BOTH},
    **{f"parts of heads by angle {way}": Line(
        ANGLES, "head_dim nnz", [(dim, 9)], [{"interleave": way, "rotary_dim": part}])
       for way in BOTH for dim, part in _PARTS[way]},
    "wide heads": Line([COS_SIN], "nnz head_dim rotary_dim max_seq_len", [
        (n, *each, 70) for each in _WIDE for n in (1, 40)],
        grid(interleave=BOTH), every_dtype=True),
    # With interleave it is read past its end, and what is there has no effect.
    "the table's last row": Line(
        [COS_SIN], "head_dim rotary_dim nnz max_seq_len",
        [(128, 128, 9, 70), (512, 512, 9, 70), (128, 64, 9, 70), (96, 96, 9, 70), (192, 64, 9, 70)],
        grid(interleave=BOTH), tables=lambda rng, sizes: {"pos_ids": np.full(9, 69)}),
    # Bounds grow with the position: see docs/rope.md.
    **{f"positions below {most}": Line(
        ANGLES, "nnz b head_dim", [(9, 3, 128)], every_dtype=True,
        tables=lambda rng, sizes, most=most: {  # type: ignore[misc]
            "pos_ids": rng.integers(most // 2, most, 9), "offsets": rng.integers(0, most, 3)})
       for most in (1, 2**10, 2**17, 2**20)},
    "angles": Line(ANGLES, "nnz head_dim", [(9, 128)],
                   grid(rope_theta=(100.0, 1e4, 5e5, 1e7), rope_scale=(0.25, 1.0, 32.0))),
    "llama 3.1": Line(LLAMA_31, "nnz head_dim", [(9, 128)], [
        {"low_freq_factor": low, "high_freq_factor": high, "old_context_length": length,
         "rope_scale": scale} for scale in (1.0, 8.0, 32.0) for low, high, length in (
            (1.0, 4.0, 8192.0), (1.0, 32.0, 4096.0), (0.0, 1.0, 512.0), (2.0, 2.5, 8192.0),
            (1.0, 4.0, 0.0), (1.0, 4.0, 1e9))]),
    "quantised parts": Line(
        QUANTISE, _QUANTISING, [(23, *heads, *parts, 5, 4, 70) for heads in ((1, 1), (8, 2), (3, 5))
                                for parts in ((64, 64), (64, 512), (32, 96), (192, 192))],
        [{"quant_scale_q": 0.5, "quant_scale_kv": 3.0, "interleave": way, **kv}
         for way in BOTH for kv in _KV], every_dtype=True),
    "quantised whole": Line(QUANTISE[:2], _QUANTISING, [(23, 4, 2, 128, 0, 5, 4, 70)],
                            grid(interleave=BOTH)),
    "quantised neighbours": Line(QUANTISE, _QUANTISING, [(23, 4, 2, 16, 48, 5, 4, 70)],
                                 [{"interleave": True, "enable_pdl": True}]),
    "quantised odd parts": Line(QUANTISE[:1], _QUANTISING, [
        (23, 4, 2, *parts, 5, 4, 70) for parts in ((128, 64), (64, 80), (32, 16))],
        grid(interleave=BOTH)),
    "quantised tokens": Line(
        QUANTISE, _QUANTISING,
        [(n, 4, 2, 64, 64, size, 4, 70) for n, size in ((1, 4), (60, 1), (60, 3), (60, 16))], _KV,
        on_gpu=[(5000, 4, 2, 64, 64, size, 4, 70) for size in (1, 3, 16, 64)], every_dtype=True),
    **{f"quantised into pages of {size}": Line(
        QUANTISE[1:], "page_size nnz b num_qo_heads num_kv_heads rope_dim no_rope_dim max_seq_len",
        [(size, sum(edges(size)[0]), 8, 4, 2, 64, 64, 70)], _KV,
        tables=lambda rng, sizes, size=size: page_tables(*edges(size), size, rng))  # type: ignore[misc]
       for size in (1, 3, 16)},
    "vocabularies": Line(DRAWING, "h n r", [(h, 7, 7) for h in _VOCABULARIES], [{}, _WITHOUT_ALL],
                         on_gpu=[(h, 7, 7) for h in (128256, 128257, 262144, 1048575)],
                         every_dtype=True),
    "outputs": Line(DRAWING, "n r h", [(1, 1, 64), (300, 300, 64), (33, 33, 5000)],
                    grid(deterministic=BOTH)),
    "outputs that share rows": Line(DRAWING, "n r h", [(500, 3, 64)], [{"without": ARRAYS}]),
    **{f"probabilities spread by {spread}": Line(
        SAMPLERS, "h n r", [(50, 9, 9), (3000, 9, 9)], tables=_flat_and_peaked(spread))
       for spread in (0.0, 1e-3, 6.0, 20.0)},
    "strange probabilities": Line(SAMPLERS, "n r h", [(9, 9, 64)] * 2, tables=_strange_rows),
    **{f"logits by {scale}": Line(
        ["sampling_from_logits"], "h n r", [(h, 20, 20) for h in (1, 7, 64, 5000)],
        tables=lambda rng, sizes, scale=scale: {  # type: ignore[misc]
            "logits": scale * rng.standard_normal((20, sizes["h"]))}) for scale in (0.01, 30.0)},
    "chain": Line([CHAIN], "h s n", [(h, s, n) for h in (1, 2, 5, 64, 1000, 4099)
                                     for s in (1, 2, 3, 7, 20) for n in (1, 9)],
                  on_gpu=[(h, s, 9) for h in (32000, 128256) for s in (1, 20)]),
    "long chains": Line([CHAIN], "n s h", [(200, 4, 50)],
                        grid(deterministic=BOTH, without=((), SEEDS)), every_dtype=True),
    # Each of the kernel's ways: a row in a block, kept or read twice, and rows in slices.
    "softmax": Line(["softmax"], "n h", [
        (1, 1), (3, 7), (16, 4096), (17, 4096), (32, 2048), (40, 2048), (200, 30), (1, 24575),
        (3, 24576), (2, 24577)], [
        w | {"enable_pdl": pdl} for pdl in BOTH for w in ({}, _WITHOUT_ALL)],
        on_gpu=[(128, 24576), (129, 24576), (4, 128256), (5, 128257), (1000, 32000),
                (1, 2**23 + 4), (65536, 64)]),
    # An array is used instead of a number.
    **{f"temperatures of logits by {scale}": Line(
        ["softmax"], "n h", [(6, 1000)],
        [*({"temperature_val": t, "without": FILTERED} for t in (0.01, 0.5, 1.0, 100.0)),
         {"temperature_val": 7.0}],
        tables=lambda rng, sizes, scale=scale: {  # type: ignore[misc]
            "logits": scale * rng.standard_normal((6, 1000)),
            "maybe_temperature_arr": rng.choice([0.01, 0.5, 100], 6) * rng.uniform(0.5, 2, 6)})
       for scale in (1, 5, 500)},
    "top k": Line(TOP_K, "h n", [(h, 5) for h in _FILTERS], [{}, _WITHOUT_ALL],
                  on_gpu=[(h, 5) for h in _LARGE], every_dtype=True),
    "values of k": Line(TOP_K, "n h", [(5, 1000)], [
        {"top_k_val": k, "without": FILTERED} for k in (1, 7, 999, 1000, 1001, 2**31 - 1)],
        every_dtype=True),
    # More than blocks, and more than groups of blocks that share a row.
    "many rows of top k": Line(TOP_K, "n h", [(300, 64), (1, 3000)],
                               on_gpu=[(1000, 1000), (200, 128256), (65537, 8)]),
    "top p": Line(["top_p_renorm_probs"], "h n", [(h, 5) for h in _FILTERS],
                  [{"is_deterministic": d} | w for d in BOTH for w in ({}, _WITHOUT_ALL)],
                  on_gpu=[(h, 5) for h in _LARGE]),
    "many rows of top p": Line(["top_p_renorm_probs"], "n h", [(300, 40), (40, 3000)],
                               on_gpu=[(2000, 5000), (5000, 8)]),
    **{f"top p spread by {spread}": Line(
        ["top_p_renorm_probs"], "h n", [(300, 20), (5000, 20)],
        [{"top_p_val": p, "without": FILTERED} for p in (1e-4, 0.1, 0.5, 0.9, 0.999, 1.0, 4.0)],
        on_gpu=[(128256, 20)], tables=_flat_and_peaked(spread)) for spread in (0.3, 2.0, 6.0)},
    "greatest": Line(TOP_KS, "d top_k n", [(*each, 3) for each in TOP_K_SIZES],
                     [{}, {"without": (*SCRATCH, *STARTS, "maybe_row_to_batch")}],
                     on_gpu=[(*each, 3) for each in TOP_K_LARGE], every_dtype=True),
    "greatest of many": Line(TOP_KS, "n d top_k", [(200, 50, 7), (33, 3000, 100)],
                             grid(deterministic=BOTH), on_gpu=[
        (70, 131072, 100), (100, 60000, 2048), (5000, 1000, 50), (65537, 16, 3)]),
    # Which of them are chosen is said, or open.
    "greatest of ties": Line(TOP_KS, "d top_k n", [(50, 7, 6), (3000, 1000, 6), (4096, 1, 6)],
                             grid(tie_break=(0, 1, 2)), [(128256, 2048, 6)], True, _ties),
    "greatest of extremes": Line([PLAIN], "top_k d n", [
        (k, 300, 20) for k in (1, 30, 150, 299, 300)], every_dtype=True, tables=_extremes),
    # None, one, as many as are chosen, one more, and all; in parts that start anywhere.
    **{f"greatest of windows {i}": Line(
        TOP_KS[1:], "n d top_k", [(10, 64, 10)],
        [{}, {"deterministic": True}, {"tie_break": 2}, {"dsa_graph_safe": True}],
        tables=_windows(starts))
       for i, starts in enumerate(([0] * 10, [0, 63, 20, 54, 53, 1, 0, 64, 59, 30]))},
    "more than there is": Line(TOP_KS[1:], "top_k d n", [(k, 64, 7) for k in (65, 500, 5000)]),
    # Rows of two requests; a table that is longer than the rows.
    "shared page tables": Line([PAGES], "n d top_k b m", [(30, 50, 9, 2, 70)],
                               [{}, {"without": STARTS}], every_dtype=True),
    # The least of each, what is no power of two, and what models have.
    "bmm": Line(["bmm_fp8"], "b m n k", [
        (1, 1, 16, 16), (1, 1, 16, 64), (3, 5, 48, 48), (2, 17, 80, 112), (16, 48, 80, 64),
        (1, 2, 64, 4096), (4, 4, 64, 1024), (1, 5, 64, 16384)],
        on_gpu=[(1, 128, 4096, 4096), (4, 200, 1008, 1024), (1, 33, 512, 16384)],
        every_dtype=True),
    "bmm with scratch of its own": Line(["bmm_fp8"], "b m n k", [(2, 17, 80, 112), (2, 0, 80, 112)],
                                        [{"without": SCRATCH}]),
    # Until 0.6.14 only as far as a warp needs one stage: test_limits.py.
    "few rows": Line(["tinygemm2", "tinygemm2_nobias"], "n m k", [
        (1, 16, 64), (3, 16, 72), (4, 32, 360), (8, 64, 720), (8, 16, 256), (9, 48, 320),
        (2, 1024, 960), (5, 64, 1000), (37, 256, 1024)],
        grid(use_pdl=BOTH), on_gpu=[(2, 1024, 2880), (37, 256, 4096), (3, 4096, 14336),
                                    (16, 28672, 1088)]),
    "routers": Line(ROUTERS, "n", lines_of(1, 2, 7, 15, 16), grid(launch_with_pdl=BOTH)),
    "two states": Line(MERGES[:2], "head_dim n num_heads", [
        (dim, n, heads) for dim in (64, 128, 256, 512) for n, heads in ((1, 1), (33, 4), (7, 32))],
        [{}, {"without": ("mask",)}], every_dtype=True),
    # Where the kernel for many sets begins, and where its rows of threads have one set each, or
    # none, or several, in and past what is loaded ahead.
    "many states": Line(MERGES[2:], "head_dim n num_index_sets num_heads", [
        (dim, *each, 2) for dim in (64, 128, 256, 512) for each in (
            (1, 1), (2, 1), (1, 2), (5, 2), (2, 2), (2, 5), (3, 16), (3, 17), (1, 64), (1, 65),
            (2, 300), (7, 0), (7, 6), (7, 7))], every_dtype=True),
    **{f"states of sums by {spread} from {offset}": Line(
        MERGES[2:], "n num_index_sets num_heads head_dim", [(50, 8, 3, 128), (8, 50, 3, 128)],
        tables=_far_sums(offset, spread))
       for offset, spread in ((0, 40), (3000, 1), (-20000, 200))},
    # As many as a block of 1024 threads has, and one more where a head has a block; and none.
    "heads of states": Line(MERGES, "head_dim num_heads n num_index_sets", [
        (64, 128, 3, 2), (128, 64, 3, 2), (256, 32, 3, 2), (512, 32, 3, 2), (64, 0, 3, 2)]),
    "more heads of states": Line(MERGES[2:], "head_dim num_heads n num_index_sets", [
        (64, 129, 2, 2), (128, 65, 2, 2), (256, 33, 2, 2), (512, 33, 2, 2)]),
    "appended": Line(APPENDS[:1], "page_size num_kv_heads head_dim nnz b", [
        (size, heads, dim, 23, 4) for size in (1, 3, 16, 64) for heads in (1, 4, 8)
        for dim in (64, 128, 256, 512)], _KV, every_dtype=True),
    "appended parts": Line(APPENDS[1:], "page_size nnz b", [
        (size, n, 4) for size in (1, 3, 16, 64) for n in (1, 37, 1000)], every_dtype=True),
    "rows in pieces": Line(["fp8_quantize_1x128"], "n k128",
                           [(n, k) for n in (1, 3, 4, 5, 130) for k in (1, 3, 56)]),
    "pieces of extremes": Line(["fp8_quantize_1x128"], "n k128", [(8, 2)], tables=_quantised),
}  # fmt: skip


def _params() -> Iterator[Any]:
    for about, line in LINES.items():
        for call in EVERY_CALL:
            op, dtypes = call.values
            if op.row.name in line.ops and (line.every_dtype or dtypes == default_dtypes(op.row)):
                yield pytest.param(line, op, dtypes, id=f"{about}-{call.id}")


def known(op: Op, options: Options) -> dict[str, Any]:
    """Those that the op has: a line is of several, and of releases that differ."""
    names = {arg.name for arg in op.row.given} | {"without"}
    found = {name: value for name, value in options.items() if name in names}
    optional = {arg.name for arg in op.row.tensors if arg.optional or arg.is_scratch}
    return found | ({"without": optional & {*found["without"]}} if "without" in found else {})


def is_within(op: Op, sizes: Mapping[str, int], options: Options) -> bool:
    """Whether the row of the kernels in use has the size."""
    most = limits(op.row, "<=")
    of_sizes = [rule for rule in op.row.rules if {*rule.names} <= sizes.keys()]
    return all(size <= most.get(axis, (size,))[0] for axis, size in sizes.items()) and all(
        eval(rule.condition, {**FUNCTIONS, **rule.using}, dict(sizes)) for rule in of_sizes
    )


@pytest.mark.parametrize(("line", "op", "dtypes"), list(_params()))
def test_is_right(line, op, dtypes, machine, rng, record_property):
    needs(op, machine)
    worst, made = 0.0, set()
    for sizes, options in line.calls(machine.is_gpu):
        options = known(op, options)
        told = str((sizes, options))
        if told in made or not is_within(op, sizes, options):
            continue
        made.add(told)
        sizes = {**inputs_of(op.row).small, **sizes}
        tables = None if line.tables is None else line.tables(rng, sizes)
        case = make_case(op.row, sizes, dtypes, rng, tables, **options)
        error = check_on(machine, case)
        worst = max(worst, error)
        assert error <= (op.row.name not in BIT_FOR_BIT), told
    record_property("error_of_bound", worst)
    assert made, "no row of these releases has any of the sizes"


def test_every_line_has_its_options():
    """No option is of an argument that none of the line's ops has."""
    for about, line in LINES.items():
        names = {arg.name for name in line.ops for row in OPS[name].rows for arg in row.args}
        assert {name for each in line.each for name in each} <= names | {"without"}, about


# By rows alone, for every op but the gated delta rule: test_gdn.py.

EVERY = [op for op in OPS.values() if op.row.module != "gdn_prefill_sm90"]


def of_ops(has: Callable[[Op], object]) -> pytest.MarkDecorator:
    chosen = [op for op in EVERY if has(op)]
    assert chosen, "no op has it"
    return pytest.mark.parametrize("op", chosen, ids=[op.row.name for op in chosen])


def lies_apart(arg: Tensor) -> bool:
    """Whether a tensor's rows may lie anywhere."""
    return len(arg.axis_names) > 1 and not (arg.contiguous or arg.transposed or arg.parts > 1)


def dtypes_of(op: Op, rng: np.random.Generator) -> dict[str, str]:
    of_it = [call.values[1] for call in EVERY_CALL if call.values[0] is op]
    chosen: dict[str, str] = of_it[rng.integers(len(of_it))]
    print(f"dtypes {chosen}")  # shown with a failure
    return chosen


@of_ops(lambda op: any(map(lies_apart, op.row.tensors)))
def test_rows_apart(op, machine, rng):
    """Rows with NaN between them, which stays; and heads outermost in memory."""
    needs(op, machine)
    for options in _KV:
        sizes = {**inputs_of(op.row).small, "n": 19}
        case = make_case(op.row, sizes, dtypes_of(op, rng), rng, **known(op, options))
        apart, turned = dict(case.arrays), dict(case.arrays)
        for arg in filter(lies_apart, op.row.tensors):
            array = case.arrays[arg.name]
            apart[arg.name] = padded(array, 16)
            if array.ndim == 3:
                turned[arg.name] = np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)
        assert check_on(machine, replace(case, arrays=apart)) <= 1
        if op.row.name in (*APPLY, "concat_mla_k"):
            assert check_on(machine, replace(case, arrays=turned)) <= 1


def is_repeatable(op: Op) -> bool:
    """Whether the same call again finds what it reads as it was; or writes it where it was."""
    again = [arg for arg in op.row.tensors if arg.writes and arg.reads and not arg.is_scratch]
    is_partial = op.row.name == "segment_packbits"  # bytes between segments stay as they are
    return not is_partial and (not again or "append" in op.row.name)


@of_ops(is_repeatable)
def test_recorded_and_replayed(op, machine, rng):
    """With its own scratch and with the stream's, which is there from the call before."""
    needs(op, machine)
    for without in ((), SCRATCH):
        more = known(op, {"without": without, "deterministic": True})
        for sizes in (inputs_of(op.row).small, inputs_of(op.row).usual):
            case = make_case(op.row, sizes, default_dtypes(op.row), rng, **more)
            assert check_replayed(machine, case) <= 1


@of_ops(lambda op: {"n", "nnz"} & {axis for arg in op.row.tensors for axis in arg.axis_names})
def test_nothing(op, machine, rng):
    """Nothing is launched, and nothing written: the addresses are not even memory."""
    needs(op, machine)
    sizes = {**inputs_of(op.row).small, "n": 0, "nnz": 0}
    assert check_on(machine, make_case(op.row, sizes, default_dtypes(op.row), rng)) == 0


# Ops whose kernels keep their state in scratch, and sizes whose rows blocks share or do not.
_SIZES_IN_TURN: dict[str, tuple[list[dict[str, int]], list[dict[str, int]]]] = {
    name: ([{"n": 5, "h": 100}, {"n": 1, "h": 5000}, {"n": 40, "h": 64}],
           [{"n": n, "h": h} for n, h in ((3, 128256), (60, 128256), (1, 1000000), (70, 60000))])
    for name in WHOLE_ROWS
} | {
    name: ([{"n": 5, "d": 100, "top_k": 7}, {"n": 1, "d": 5000, "top_k": 3000}],
           [{"n": n, "d": d, "top_k": k} for n, d, k in (
               (3, 131072, 4000), (64, 131072, 2500), (1, 1000000, 3000), (2, 60000, 100))])
    for name in TOP_KS
}  # fmt: skip


def placed_of(machine: Any, case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    return placed, {name: array.desc() for name, array in placed.items()}


@pytest.mark.parametrize("name", [*TOP_K, *TOP_KS])
def test_scratch_serves_calls_of_any_size(name, machine, rng):
    """One buffer, zero before the first: rows that are shared and rows that are not in turn."""
    op = OPS[name]
    machine.need(op.row)
    (own,) = {arg.name for arg in op.row.tensors} & {*SCRATCH}
    scratch = machine.place(np.zeros(2**20, np.uint8))
    few, many = _SIZES_IN_TURN[name]
    for _, sizes, dtype, deterministic in itertools.product(
        range(2), few + many * machine.is_gpu, ("float32", "bfloat16"), BOTH
    ):
        more = known(op, {"deterministic": deterministic, "without": (own,)})
        if "page_table" in name and sizes in many and not deterministic:
            continue  # refused: blocks that share a row take its values in no order
        sizes = {**inputs_of(op.row).small, **sizes}
        case = make_case(op.row, sizes, {"T": dtype}, rng, **more)
        placed, descs = placed_of(machine, case)
        op(**descs, **{own: scratch.desc()}, **case.scalars, stream=machine.stream)
        assert all(case.error(out, placed[out].get())[1] <= 1 for out in case.expected), sizes
    assert scratch.intact()


@pytest.mark.parametrize("name", [*_SIZES_IN_TURN, "top_p_sampling_from_probs"])
def test_streams_have_scratch_of_their_own(name, machine, rng):
    """Calls one after the other on each of several streams; rows that are shared take turns."""
    op = OPS[name]
    machine.need(op.row)
    long = 40000 if machine.is_gpu else 2500
    sizes = {**inputs_of(op.row).small, "n": 6, "r": 6, "h": long, "d": long, "top_k": 64}
    calls = []
    for stream in machine.streams(4):
        more = known(op, {"without": SCRATCH})
        case = make_case(op.row, sizes, default_dtypes(op.row), rng, **more)
        calls.append((case, *placed_of(machine, case), stream))
    for _ in range(machine.rounds(20)):
        for case, _, descs, stream in calls:
            op(**descs, **case.scalars, stream=stream)
    machine.synchronize()
    for case, placed, _, _ in calls:
        assert all(case.error(out, placed[out].get())[1] <= 1 for out in case.expected)


@pytest.mark.parametrize("name", [*DRAWING, CHAIN, *TOP_KS, "top_p_renorm_probs"])
def test_the_same_each_time(name, machine, rng):
    """Deterministic is bit for bit, and in the same order."""
    op = OPS[name]
    machine.need(op.row)
    more = known(op, {"deterministic": True, "is_deterministic": True})
    for sizes in ({"n": 20, "r": 20, "h": 3000, "d": 3000, "top_k": 100},
                  *[{"n": 20, "r": 20, "h": 128256, "d": 131072, "top_k": 500}] * machine.is_gpu
                  ):  # fmt: skip
        rows = rng.integers(0, 50, (20, sizes["d"])).astype(float)
        tables = {"input": rows} if name in TOP_KS else {}
        sizes = {**inputs_of(op.row).small, **sizes}
        case = make_case(op.row, sizes, default_dtypes(op.row), rng, tables, **more)
        outs = [name for name in case.expected if not name.endswith("_num")]
        seen = set()
        for _ in range(machine.rounds(30)):
            placed, descs = placed_of(machine, case)
            op(**descs, **case.scalars, stream=machine.stream)
            seen.add(b"".join(placed[out].get().tobytes() for out in outs))
        assert len(seen) == 1


@of_ops(lambda op: any(arg.axes == "1" and arg.is_loose for arg in op.row.tensors))
def test_one_element_of_any_rank(op, machine, rng):
    """As a maximum has it, or kept in axes: the same bytes."""
    needs(op, machine)
    more = known(op, {"deterministic": True})
    case = make_case(op.row, inputs_of(op.row).small, dtypes_of(op, rng), rng, **more)
    ones = [arg.name for arg in op.row.tensors if arg.axes == "1" and arg.is_loose]
    written = [arg.name for arg in op.row.tensors if arg.writes and not arg.is_scratch]
    wanted = run(machine, op.row.name, case.arrays, **case.scalars)
    for shape in ((), (1, 1)):
        arrays = case.arrays | {name: case.arrays[name].reshape(shape) for name in ones}
        got = run(machine, op.row.name, arrays, **case.scalars)
        assert all(got[name].tobytes() == wanted[name].tobytes() for name in written), shape
