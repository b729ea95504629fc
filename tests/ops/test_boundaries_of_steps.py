"""Bounds of rows that functions of several steps check: as test_boundaries.py has them of ops."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.memory import scratch_bytes
from fi_ffi.ops.call.row import Row, Scalar
from fi_ffi.ops.matmul import rows as of_matmul
from fi_ffi.ops.moe import lora, weights
from fi_ffi.ops.plans.rows import FORMS, XQA, XQA_MLA, XQA_SPEC_DEC
from fi_ffi.ops.states import gdn, kda, mamba
from fi_ffi.ops.table import comm

from tests.helpers.limits import FAR, Bound, laid_out, misjudged
from tests.ops.test_boundaries import (
    FP8_UNITS,
    GPUS,
    GRID,
    HOPPER,
    INT,
    LATER,
    cut,
    tiles,
)

B = functools.partial(Bound, "")


CPU = parse_device("cpu")


class Rows(NamedTuple):
    """Rows, a right call's sizes and numbers, the optional tensors that it has, and bounds."""

    rows: list[Row]
    given: Mapping[str, Any]
    bounds: list[Bound]
    optional: tuple[str, ...] = ()


def of_matmul_called(name: str) -> list[Row]:
    return [row for row in of_matmul.ROWS if row.name == name]


def of_comm(name: str) -> list[Row]:
    return [row for row in comm.OPS if row.name == name]


def segments(step: int) -> list[Bound]:
    return [
        B("n", range(INT)),
        B("d_in", range(step, INT, step), {"n": 1}),
        B("d_out", range(8, INT, 8), {"n": 1}),
    ]


BLOCK_SCALES = "fp8_blockscale_gemm_sm90"
_FP8_SCALES = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn"}
PRODUCTS = [
    B("k", range(16, INT, 16), {"b": 1, "m": 1, "n": 16}),
    B("n", range(0, INT, 16), {"b": 1, "m": 1}),
    B("m", range(INT), {"b": 1}),
    B("m", range(INT // 32), {"b": 2}, "several"),
    B("m", range((INT - 1) // 48 + 1), {"b": 2, "k": 16, "n": 48}, "several"),
    B("n", range(0, INT // 32, 16), {"b": 2, "m": 1}, "several|16"),
]
_GRANULES = {"scale_granularity_m": 1, "scale_granularity_n": 128, "scale_granularity_k": 128}
_GROUPWISE = {"m": 8, "n": 256, "k": 256, "a0": 8, "a1": 2, "b0": 2, "b1": 2, "groups": 1,
              "scale_major_mode": "K", "mma_sm": 1, **_GRANULES}  # fmt: skip
_A_PIECE = {"k": 128, "a1": 1, "b1": 1}


def groupwise(columns: int) -> list[Bound]:
    """The rows of a scale are multiples of 1 or 128, the columns of it multiples of 128."""
    return [
        B("k", range(128, FAR, 128), {"a1": lambda k: k // 128, "b1": lambda k: k // 128}),
        B("n", range(columns, INT // 8, columns), {
            "m": 8, "b0": lambda n: cut(n, 128), **_A_PIECE}, "."),
        *(B("b0", (count,), {"n": n}, ".")
          for n, count in ((8, 1), (128, 1), (136, 2), (256, 2), (384, 3)) if n % columns == 0),
        *(B("a0", (count,), {"m": m, "scale_granularity_m": size}, ".")
          for m, size, count in ((8, 1, 8), (128, 128, 1), (256, 128, 2))),
    ]  # fmt: skip


STATE = {"b": 3, "H": 2, "HV": 4, "slots": 5, "size": 128, "D": 128, "t": 3, "n": 2, "tokens": 4,
         "scale": 1.0, "eps": 1e-6, "lower_bound": -5.0, "g_stride_q": 512,
         "state_stride0": 65536, "src_stride0": 65536, "use_qk_l2norm": True, "has_bound": False,
         "disable_state_update": False, "use_qk_l2norm_in_kernel": True,
         "beta_is_logit": False}  # fmt: skip
HEADS_OF_STATES = [B("HV", range(0, FAR, 2), {"H": 2}, "HV = .* multiple of H = 2"),
                   B("H", (1, 2, 4), {"HV": 4}, ".")]  # fmt: skip
MAMBA = {"b": 3, "t": 2, "tokens": 4, "slots": 5, "nheads": 8, "ngroups": 2, "dim": 64,
         "dstate": 128, "indices": 3, "targets": 3, "entries": 5, "steps": 2, "accepted": 3,
         "width": 2, "depth": 2}  # fmt: skip
OF_STATES = [
    B("dim", range(16, (INT - 1) // 1024 + 1, 16), {"dstate": 128, "b": 0}, f"16|{INT - 1}"),
    B("b", range(6), {"slots": 5, "indices": 9, "targets": 9, "accepted": 9}, "slots"),
    B("slots", range(3, INT), {"b": 3}, f"at least b = 3|{INT - 1}"),
]
WIDE_OF_STATES = [
    *OF_STATES,
    B("dstate", range(32, (INT - 1) // 512 + 1, 8), {"b": 0}, f"32|8|{INT - 1}"),
]
XQA_CALL = {
    "b": 3, "num_qo_heads": 8, "num_kv_heads": 2, "page_size": 16, "head_dim": 128, "num_pages": 4,
    "max_pages": 2, "q_seq_len": 2, "run_sm90_fp8_mha": False, "multiProcessorCount": 1,
    "nbKHeads": 2, "slidingWinSize": 0, "qScale": 1.0, "rcpOutScale": 1.0, "maxSeqLen": 32,
    "batchSize": 3, "kvCacheScale": 1.0, "qSeqLen": 2,
}  # fmt: skip
FUSED = {"world_size": 4, "world_rank": 3, "pointers": 13, "token_num": 9, "hidden_size": 512,
         "pattern_code": 0, "half_size": 256}  # fmt: skip
OF_RANKS = [
    B("world_size", (2, 4, 8, 16), {
        "world_rank": 0, "pointers": lambda size: 3 * max(size, 0) + 1}, "."),
    *(B("world_rank", range(size), {"world_size": size, "pointers": 3 * size + 1}, ".")
      for size in (2, 4, 8, 16)),
    *(B("pointers", (3 * size + 1,), {"world_size": size, "world_rank": 0}, ".")
      for size in (2, 16)),
]  # fmt: skip

# A run's tensors, with heads of 128 elements; its numbers are those of an empty plan.
RUN = {
    "num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 128, "head_dim_vo": 128, "page_size": 16,
    "num_pages": 3, "num_indices": 3, "b": 2, "nnz_qo": 5, "nnz_kv": 9, "float_bytes": 64,
    "int_bytes": 64, "tmp_bytes": 64, "plan_info_vec": 1, "mask_mode_code": 0, "window_left": -1,
    "sm_scale": 1.0, "Q": "float16", "KV": "float16", "O": "float16",
}  # fmt: skip
HEADS_OF_A_RUN = [
    B("num_qo_heads", range(0, FAR, 2)[1:], {"nnz_qo": 0, "b": 0}, "1$|multiple of"),
    B("num_kv_heads", (1, 2, 4, 8), says="1$|multiple of"),
]
# Caches are addressed in 64 bits, from strides of 32; queries and outputs in an int.
OF_QUERIES = B("nnz_qo", range(2**21 + 1), says=f"offsets below {INT}")
OF_PAGES = B("page_size", range(1, 2**24), says="1$|below 4294967296")


def runs(name: str) -> list[Row]:
    """Forms for queries of 16 bits."""
    return [row for forms in FORMS.values() for row in forms
            if row.name == name and "float16" in row.dtypes.get("Q", ())
            and "float16" in row.dtypes.get("KV", ("float16",))]  # fmt: skip


TABLE = {
    "decode": Rows(runs("batch_decode.run"), RUN, [
        *HEADS_OF_A_RUN, OF_PAGES, B("b", range(2**21 + 1), says=f"offsets below {INT}"),
    ]),
    "prefill of pages": Rows(
        runs("batch_prefill.paged_run"), RUN, [*HEADS_OF_A_RUN, OF_PAGES, OF_QUERIES]),
    "prefill": Rows(runs("batch_prefill.ragged_run"), RUN, [*HEADS_OF_A_RUN, OF_QUERIES]),
    "prefill of a request": Rows(
        runs("single_prefill.run"), RUN, [*HEADS_OF_A_RUN, OF_QUERIES]),
    "decode of a request": Rows(runs("single_decode.run"), RUN, [
        *HEADS_OF_A_RUN, B("nnz_kv", range(1, 2**23 + 1), says=f"1$|offsets below {INT}")]),
    "segments": Rows([of_matmul.SEGMENTS[False, order] for order in (False, True)],
                     {"n": 3, "d_in": 16, "d_out": 24, "num_weights": 2}, segments(8)),
    "segments of fp8": Rows([of_matmul.SEGMENTS[True, True]],
                            {"n": 3, "d_in": 16, "d_out": 24, "num_weights": 2}, segments(16)),
    "algorithms": Rows(
        of_matmul_called("bmm_fp8_get_algos"),
        {"b": 2, "m": 5, "n": 16, "k": 32, "algo_bytes": 6400}, PRODUCTS),
    "an algorithm": Rows(
        of_matmul_called("bmm_fp8_run_with_algo"),
        {"b": 2, "m": 5, "n": 16, "k": 32, "algo_bytes": 6400, "algo_idx": 0},
        [*PRODUCTS, B("algo_idx", range(FAR))]),
    # Hopper's: as deep as what it has room for, and outputs and scales counted in an int.
    "block scales": Rows(of_matmul_called(BLOCK_SCALES), {"m": 5, "n": 64, "k128": 2}, [
        B("k128", range(1, 161)),
        B("n", range(64, 2**24 // 160, 64), {"m": 1, "k128": 160}, "64|16777215"),
        B("n", range(64, 2**24, 64), {"m": 1, "k128": 1}, "64|16777215"),
        B("m", range(INT // 64), {"n": 64}, f"{INT - 1}"),
    ]),
    "block scales of fp8": Rows(
        of_matmul_called(BLOCK_SCALES),
        {"m": 5, "n": 64, "k128": 2, "m4": 8, "n128": 1, **_FP8_SCALES}, [
            *(B("m4", (room,), {"m": m}, "fp8_quantize_1x128")
              for m, room in ((1, 4), (4, 4), (5, 8), (8, 8), (9, 12))),
            *(B("n128", (count,), {"n": n}, "128 x 128")
              for n, count in ((64, 1), (128, 1), (192, 2), (256, 2), (320, 3))),
        ], ("scales_a", "scales_b")),
    "groupwise": Rows(
        [row for row in of_matmul_called("gemm_fp8_nt_groupwise") if row.capabilities == (10,)],
        _GROUPWISE, [*groupwise(8),
                     B("m", range(0, INT // 8, 4), {"n": 8, "b0": 1, "a0": lambda m: m}, ".")]),
    "groupwise, SM120": Rows(
        [row for row in of_matmul_called("gemm_fp8_nt_groupwise") if row.capabilities == (12,)],
        _GROUPWISE, groupwise(128)),
    "groups": Rows(
        [row for row in of_matmul_called("group_gemm_fp8_nt_groupwise")
         if row.capabilities == (10,)], _GROUPWISE, groupwise(8)),
    "groups, SM120": Rows(
        [row for row in of_matmul_called("group_gemm_fp8_nt_groupwise")
         if row.capabilities == (12,)],
        _GROUPWISE, [*groupwise(128), B("groups", (1,), says="one matrix")]),
    "adapters": Rows([lora.CHECKS], {"n": 3, "h": 768, "pairs": 5, "total": 768}, [
        B("n", range(INT), {"h": 384}), B("pairs", range(INT)),
        B("h", (384, 736, 768, 1024, 1344, 1472, 1536, 1856, 2048, 2112, 2688, 2816, 2880, 2944,
                    3072, 4096, 5120, 5888, 7168, 8192, 10240, 14336, 16384, 28672)),
    ]),
    "weights of experts": Rows(
        [*weights.WEIGHTS.rows],
        {"experts": 2, "rows": 16, "packed": 32, "quant_type": 0}, [
            B("rows", range(0, INT // 64, 16), {"packed": 32}, f"16|{INT // 2 - 1}"),
            B("packed", range(0, INT // 32, 32), {"rows": 16}, f"32|{INT // 2 - 1}"),
        ]),
    "gated delta rule": Rows([gdn.row_of(gdn.GdnKernel(2, 4))], STATE, [
        B("size", (128,)), *HEADS_OF_STATES,
    ]),
    # Blocks of 8 of a state's values, counted in an int; a grid's second dimension has requests.
    "delta attention": Rows([kda.row_of(kda.KdaKernel())], STATE, [
        *HEADS_OF_STATES,
        B("b", range((INT // 16 - 1) // 4 + 1), {"HV": 4}, f"{INT // 16 - 1}"),
    ]),
    "delta attention to 64": Rows(
        [kda.row_of(kda.KdaKernel(head_size=64))], {**STATE, "D": 64}, [
            B("b", range((INT // 8 - 1) // 4 + 1), {"HV": 4}, f"{INT // 8 - 1}"),
            B("D", (64,))]),
    "delta attention of several tokens": Rows(
        [kda.row_of(kda.KdaKernel(t=3, h=2, hv=4))], STATE, [
            *HEADS_OF_STATES, B("n", range(1, GRID)),
            B("tokens", range(INT // 512 + 1), {"HV": 4}, f"{INT} elements"),
        ]),
    "states": Rows([mamba.row_of("one", 1, 1)], MAMBA, [
        *WIDE_OF_STATES,
        B("nheads", range(1, GRID), {"ngroups": 1, "dim": 16, "dstate": 32}),
        B("nheads", range(2, GRID, 2), {"ngroups": 2, "dim": 16, "dstate": 32}, "2|65535"),
        B("indices", range(3, FAR), says="an index for each request"),
        B("targets", range(3, FAR), says="an index for each request"),
    ], ("state_batch_indices", "dst_state_batch_indices")),
    "states of several tokens": Rows([mamba.row_of("steps", 2, 2)], {**MAMBA, "cache_steps": 0}, [
        *WIDE_OF_STATES[1:],
        B("nheads", (2, 4, 8, 16, 32, 64, 128), {"ngroups": 2}, "heads each|multiple"),
        B("width", range(2, FAR), says="an index for each token"),
        B("depth", range(2, FAR), says="an index for each token"),
        B("accepted", range(3, FAR), says="a number for each request"),
    ], ("state_batch_indices", "dst_state_batch_indices", "num_accepted_tokens")),
    "states that are kept": Rows([mamba.row_of("steps", 1, 1)], {**MAMBA, "cache_steps": 2}, [
        B("cache_steps", range(2, FAR), {"steps": lambda count: max(count, 0)}, "."),
        B("steps", (2,), says="."),
        B("entries", range(5, FAR), says="an entry for each state"),
    ], ("intermediate_states_buffer",)),
    "states of int16": Rows([mamba.row_of("one", 1, 1, mamba.INT16)], MAMBA, [
        *OF_STATES,
        B("dstate", (64, 128, 192, 256, 512, 768), {"b": 0}, "."),
    ]),
    "xqa": Rows([*FORMS[XQA]], {**XQA_CALL, "q_seq_len": 1, "qSeqLen": 1}, [
        B("page_size", (16, 32, 64, 128)),
        B("head_dim", range(0, FAR, 16)),
        B("b", range(GRID), {"batchSize": lambda count: max(count, 0)}),
        B("num_kv_heads", range(1, GRID), {
            "num_qo_heads": lambda count: max(count, 1), "nbKHeads": lambda count: max(count, 0)},
          "1|65535"),
        B("b", range(GRID // 2), {"run_sm90_fp8_mha": True}, "65535"),
        B("num_qo_heads", range(2, FAR, 2), {"num_kv_heads": 2}, "1|2"),
    ]),
    "xqa of several queries": Rows([*FORMS[XQA_SPEC_DEC]], XQA_CALL, [
        B("page_size", (16, 32, 64, 128)), B("b", range(GRID)),
    ]),
    # 128 heads of 576 elements, of which values have 512.
    "xqa of latent keys": Rows([*FORMS[XQA_MLA]], {
        **XQA_CALL, "num_qo_heads": 128, "head_dim": 576}, [
            B("num_qo_heads", (128,)), B("head_dim", (576,)), B("b", range(GRID)),
            B("page_size", (16, 32, 64, 128)),
        ]),
    "sums of ranks": Rows(of_comm("trtllm_allreduce_fusion"), FUSED, [
        *OF_RANKS,
        B("hidden_size", range(0, FAR, 8), {"token_num": 0, "T": "float16"}, "."),
        B("hidden_size", range(0, FAR, 4), {"token_num": 0, "T": "float32"}, "."),
        *(B("token_num", range((INT - 1) // 512 // size + 1), {
            "world_size": size, "world_rank": 0, "pointers": 3 * size + 1}, f"{INT - 1} elements")
          for size in (2, 16)),
        *(B("token_num", range(size + 1, (INT - 1) // 1024 + 1), {
            "use_oneshot": False, "world_size": size, "world_rank": 0, "pointers": 3 * size + 1},
            f"{INT - 1} elements|no more tokens than ranks") for size in (2, 16)),
    ], ("allreduce_out",)),
    "sums of ranks in 4 bits": Rows(
        of_comm("trtllm_allreduce_fusion_fp4"), {**FUSED, "pattern_code": 3, "scales": 4096}, [
            *(B("scales", range(tiles(tokens, cut(size, 16)), FAR), {
                "token_num": tokens, "hidden_size": size, "half_size": size // 2}, ".")
              for tokens, size in ((1, 512), (128, 512), (129, 512), (128, 528), (128, 576))),
            *(B("scales", range(tokens * cut(size, 16), FAR), {
                "token_num": tokens, "hidden_size": size, "half_size": size // 2,
                "layout_code": 2}, ".")
              for tokens, size in ((1, 512), (7, 528), (128, 512))),
            B("layout_code", (0, 2), says="."),
        ]),
    "sums of ranks in blocks": Rows(
        of_comm("trtllm_allreduce_fusion_block_fp8"), {**FUSED, "pattern_code": 8}, [
            # Four scales of a byte in each word; words of a column lie together, in fours.
            *(B("scales", range(least, FAR), {"token_num": tokens, "hidden_size": size}, ".")
              for tokens, size, least in ((1, 512, 1), (9, 512, 9), (9, 640, 21), (8, 1024, 16),
                                          (8, 1152, 24))),
            B("block_quant_group_size", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), {
                "scales": 2**20}, "."),
        ]),
    "sums of ranks with scales": Rows(
        of_comm("trtllm_allreduce_fusion_dynamic_fp8"), {**FUSED, "pattern_code": 10, "scales": 9},
        [*OF_RANKS, B("scales", range(9, FAR), says=".")]),
    "sums of experts": Rows(
        of_comm("trtllm_moe_allreduce_fusion"), {**FUSED, "experts": 3}, [
            *OF_RANKS,
            B("hidden_size", range(0, FAR, 256), {"token_num": 0}, "."),
            B("token_num", range((INT - 1) // 4 // 512 + 1), says=f"{INT - 1}"),
            B("experts", range((INT - 1) // 9 // 512 + 1), says=f"{INT - 1}"),
        ]),
    "over PCIe": Rows(of_comm("pcie_ipc_all_reduce"), {
        "n": 16, "handle": 1, "blocks": 4, "threads": 32, "algorithm": 0}, [
            B("n", range(0, FAR, 8), says="16 bytes"), B("handle", range(1, FAR)),
            B("blocks", range(1, 2**16 + 1)), B("threads", range(1, 1025)),
            B("algorithm", range(7)),
        ]),
    "gathered over PCIe": Rows(of_comm("pcie_ipc_all_gather"), {
        "n": 16, "m": 64, "handle": 1, "blocks": 4, "threads": 32, "algorithm": 0, "T": "float16"},
        [
            *(B("n", range(0, FAR, 16 // size), {"m": lambda n: 2 * max(n, 0), "T": dtype},
                "16 bytes") for dtype, size in (("float16", 2), ("float32", 4))),
            B("m", (32, 64, 128), says="."),
            B("blocks", range(1, 65)), B("threads", range(32, 513, 32)),
            B("algorithm", range(3)),
        ]),
    "scattered over PCIe": Rows(of_comm("pcie_ipc_reduce_scatter"), {
        "n": 16, "m": 64, "handle": 1, "blocks": 4, "threads": 32, "algorithm": 0, "T": "float16"},
        [
            B("m", (32, 64, 128), says="."), B("blocks", range(1, 65)),
            B("threads", range(32, 513, 32)), B("algorithm", range(4)),
        ]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_values_at_and_beyond_a_bound(name):
    rows, given, bounds, optional = TABLE[name]
    assert rows
    for row in rows:
        compiled = CompiledRow(row)
        there = [
            arg for arg in row.tensors
            if not arg.is_scratch and (not arg.optional or arg.name in optional)
        ]  # fmt: skip
        names = {arg.name for arg in row.given} - {arg.name for arg in row.tensors}
        own = {arg.name for arg in row.given if isinstance(arg, Scalar) and arg.size_of}

        def judge(changes, row=row, compiled=compiled, there=there, names=names - own):
            values = {**given, **changes}
            dtypes = {key: values[key] for key in row.dtypes if isinstance(values.get(key), str)}
            descs = laid_out(row, there, values, dtypes)
            numbers = {key: values[key] for key in names & values.keys()}
            try:
                compiled.check(**descs, **numbers)
            except fi_ffi.ArgumentError as error:
                return error
            return None

        told = [told for bound in bounds for told in misjudged(row, bound, judge)]
        assert not told, (row.name, row.releases)


# Bytes that a call without scratch takes, by the argument: a piece of each multiprocessor, of which
# the CPU counts one, and counters of 4 bytes for each request, head of keys and block of 32 rows.
SCRATCH = {
    "gemm_fp8_nt_groupwise": {"float_workspace_buffer": 221184},
    "group_gemm_fp8_nt_groupwise": {
        "int_workspace_buffer": 221184, "float_workspace_buffer": 221184,
    },
    "bmm_fp8_get_algos": {"workspace_buffer": 221184},
    "bmm_fp8_run_with_algo": {"workspace_buffer": 221184},
}  # fmt: skip


@pytest.mark.parametrize("name", SCRATCH)
def test_own_scratch(name):
    for row in of_matmul_called(name):
        found = {arg.name: scratch_bytes(arg, CPU) for arg in row.tensors if arg.is_scratch}
        assert found == SCRATCH[name]


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "requests", "counters"),
    [(1, 8, 2, 3, 6), (1, 1, 1, 1, 1), (2, 32, 2, 3, 6), (2, 34, 2, 3, 12), (3, 8, 1, 5, 5),
     (4, 16, 2, 1, 2), (5, 14, 2, 1, 4), (33, 1, 1, 7, 14), (1, 8, 2, 0, 0)],
)  # fmt: skip
def test_counters_of_xqa(queries, heads, kv_heads, requests, counters):
    sizes = {"b": requests, "num_kv_heads": kv_heads, "num_qo_heads": heads, "q_seq_len": queries}
    for row in FORMS[XQA if queries == 1 else XQA_SPEC_DEC]:
        found = {arg.name: arg for arg in row.tensors if arg.is_scratch}
        assert scratch_bytes(found["semaphores"], CPU, sizes) == 4 * counters
        assert scratch_bytes(found["scratch"], CPU, sizes) == 34048


FEW = {1: (8, 2, 0), 65: (16, 4, 0), 129: (16, 2, 0), 449: (32, 4, 0)}
MORE = {1: (8, 2, 0), 65: (16, 4, 0), 129: (32, 4, 0), 1025: (64, 4, 1)}


@pytest.mark.parametrize(
    ("t", "is_off", "chosen"),
    [(2, False, FEW | {1025: (64, 8, 0)}), (2, True, FEW | {1025: (64, 4, 1)}), (3, False, MORE),
     (3, True, MORE)],
)  # fmt: skip
def test_rows_of_a_block_of_float32_states(t, is_off, chosen):
    """What FlashInfer chooses by the number of states: rows, those at once, and shared values."""
    for states in (1, 64, 65, 128, 129, 448, 449, 1024, 1025, 5000):
        kernel = gdn.GdnKernel(1, 1, t, states, "float32", disable_state_update=is_off)
        name = kernel.names((9, 0), 132)[1]
        rows, at_once, is_shared = chosen[max(first for first in chosen if first <= states)]
        assert re.search(rf"_{rows}_4_t.*xt0_{at_once}_{is_shared}_", name), (states, name)
        assert ("_inline_" in name) is (states <= 128)


@pytest.mark.parametrize(("states", "size"), [(1, "small"), (63, "small"), (64, "big")])
def test_kernels_of_states_whose_keys_are_first(states, size):
    """Of 32 requests or more another one."""
    kernel = gdn.GdnKernel(1, 2, 1, states, "float32", state_layout="KV")
    assert f"_{size}_" in kernel.names((9, 0), 132)[1]


# Majors of the GPUs that kernels were written for; those of other rows: any.
MAJORS = {
    **dict.fromkeys(("algorithms", "an algorithm"), FP8_UNITS),
    **dict.fromkeys(("block scales", "block scales of fp8", "weights of experts"), HOPPER),
    **dict.fromkeys(("groupwise", "groups", "sums of ranks in 4 bits"), (10,)),
    **dict.fromkeys(("groupwise, SM120", "groups, SM120", "xqa of latent keys"), (12,)),
    **dict.fromkeys(("adapters", "xqa", "xqa of several queries"), LATER),
    **dict.fromkeys(("delta attention", "delta attention to 64",
                     "delta attention of several tokens", "sums of ranks",
                     "sums of ranks in blocks", "sums of ranks with scales", "sums of experts"),
                    (9, 10)),
    "gated delta rule": (9, 10, 12),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_gpus_that_a_row_is_for(name):
    majors = MAJORS.get(name)
    for row in TABLE[name].rows:
        refused = [gpu for gpu in GPUS if row.other_gpus(gpu)]
        assert refused == [gpu for gpu in GPUS if majors and gpu[0] not in majors]
