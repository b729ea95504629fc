"""What rows refuse of sizes, numbers and memory together: a table of changes to right calls.

Tensors lie at addresses that nothing is at: refused is what is wrong before memory is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.call.row import Row, Scalar
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import MOST_HEADS
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.limits import laid_out
from tests.helpers.prepared_calls import refusal_of, same_error
from tests.helpers.rope_calls import ANGLES, APPLY, COS_SIN, LLAMA_31, QUANTISE
from tests.helpers.sampling_calls import SAMPLERS
from tests.ops.test_results import (
    APPENDS,
    DIT,
    GATED,
    MERGES,
    PAGES,
    PLAIN,
    ROUTERS,
    TOP_KS,
    WHOLE_ROWS,
)

_INT = 2**31 - 1
KV, MLA = QUANTISE[1:]
_MOST_PAGES = {"num_indices": 2**32 // 48, "page_size": 48}


@functools.cache
def _right(row: Row) -> tuple[Case, dict[str, int]]:
    """A right call, and its sizes by axis."""
    small = inputs_of(row).small
    case = make_case(row, small, default_dtypes(row), np.random.default_rng())
    of_tensors = {
        axis: size
        for arg in row.tensors if arg.name in case.arrays
        for axis, size in zip(arg.axis_names, case.arrays[arg.name].shape, strict=True)
        if axis.isidentifier()
    }  # fmt: skip
    return case, {**of_tensors, **small}


def described(row: Row, **changes: Any) -> dict[str, Any]:
    """A right call's arguments but for changes of sizes, dtypes, numbers, or (as a dict) a tensor's
    fields.

    A tensor that is said to be another one is that one.
    """
    case, sizes = _right(row)
    sizes = sizes | {name: value for name, value in changes.items() if type(value) is int}
    given = {arg.name for arg in row.given}
    descs = laid_out(row, (arg for arg in row.tensors if arg.name in case.arrays), sizes, changes)
    numbers = {arg.name for arg in row.given if isinstance(arg, Scalar) and not arg.size_of}
    scalars = {
        n: v for n, v in case.scalars.items() if n in numbers or n in ("bitorder", "kv_layout")
    }
    return (
        descs | scalars | {n: v for n, v in changes.items() if n in given and n not in case.arrays}
    )


Refused = tuple[Any, Mapping[str, Any], str, str]

# Ops, what is changed, the argument that is at fault, and words of the error.
REFUSED: list[Refused] = [
    *((GATED, {"d": d}, "out", f"d = {d} to be a multiple of 8") for d in (1, 2, 12, 20, 3420)),
    (GATED, {"n": 2**31}, "out", f"n = {2**31} of at most {_INT}"),
    # Rotary embeddings.
    *((ANGLES, {"head_dim": dim, "rotary_dim": part, "interleave": way}, "rotary_dim",
       "a multiple of 8 (of 16 where head_dim is 512)")
      for dim, way, step in ((64, False, 16), (64, True, 8), (256, True, 8), (512, False, 32),
                             (512, True, 16))
      for part in (4, step // 2, step + 4, dim - 4, dim - step // 2)),
    (ANGLES, {"rotary_dim": 128}, "rotary_dim", "64 or less, the size of head_dim"),
    (ANGLES, {"rotary_dim": -16}, "rotary_dim", ""),
    *((LLAMA_31, {"low_freq_factor": low, "high_freq_factor": high}, "high_freq_factor",
       "more than low_freq") for low, high in ((4.0, 4.0), (4.0, 1.0), (0.0, 0.0))),
    *((COS_SIN, {"head_dim": dim, "rotary_dim": part, "interleave": way}, "cos_sin_cache", "")
      for dim, part, way in ((128, 8, False), (128, 4, True), (512, 16, False), (96, 16, False),
                             (96, 8, True), (80, 80, False))),
    (COS_SIN, {"head_dim": 64, "rotary_dim": 128}, "", "at least rotary_dim"),
    (COS_SIN, {"head_dim": 100, "rotary_dim": 32}, "q", "multiple of 8"),
    (COS_SIN, {"rotary_dim": 0}, "cos_sin_cache", "rotary_dim of at least 1"),
    (COS_SIN, {"head_dim": 2**15, "rotary_dim": 2**15}, "", "at most 16384"),
    (COS_SIN, {"max_seq_len": 0}, "cos_sin_cache", "max_seq_len of at least 1"),
    (COS_SIN, {"max_seq_len": 2**26 + 1}, "cos_sin_cache", "offsets below 4294967296"),
    # Halves of a head that are in two warps: 32 threads of 16 elements are one.
    *((COS_SIN, {"head_dim": 1088, "rotary_dim": part, out: of}, "q_rope", "a warp may overwrite")
      for part in (96, 160, 192, 544, 1024) for out, of in (("q_rope", "q"), ("k_rope", "k"))),
    (ANGLES[2:], {"num_qo_heads": 2**15, "nnz": 1}, "q", "32767"),
    (COS_SIN, {"num_qo_heads": 2**16, "nnz": 1}, "q", "65535"),
    (ANGLES[:2], {"num_qo_heads": 2**20, "b": 2**10}, "", "b * num_qo_heads"),
    *((QUANTISE, change, "", "") for change in (
        {"rope_dim": 16}, {"rope_dim": 48}, {"rope_dim": 24, "interleave": True}, {"rope_dim": 0},
        {"no_rope_dim": 40}, {"no_rope_dim": 8}, {"num_qo_heads": 30_000})),
    # A head in two pieces, the second one short.
    (QUANTISE[0], {"rope_dim": 64, "no_rope_dim": 48, "num_kv_heads": 1, "num_qo_heads": 2**15 - 1},
     "q_rope_in", "is at most 65535"),
    (COS_SIN, {"head_dim": 96, "rotary_dim": 64, "num_kv_heads": 1, "num_qo_heads": 2**15 - 1},
     "q", "is at most 65535"),
    ("softmax", {"n": 128, "h": 2**23 + 1, "workspace_size": 2**20}, "workspace_buffer",
     f"{128 * 1025 * 8} bytes or more"),
    (QUANTISE[1:], {"no_rope_dim": 48}, "", "multiple of rope_dim"),
    (MLA, {"no_rope_dim": 0}, "", "no_rope_dim of at least 1"),
    # MLA's keys.
    *(("concat_mla_k", {axis: size}, "", f"{axis} of {right}")
      for axis, right in (("num_heads", 128), ("nope_dim", 128), ("rope_dim", 64))
      for size in (right // 2, 2 * right)),
    ("concat_mla_k", {"k_rope": {"shape": (2, 128, 64)}}, "k_rope", "shape [n, 1, rope_dim]"),
    ("concat_mla_k", {"n": 2**24 + 1}, "k", f"n = {2**24 + 1} of at most {2**24}"),
    *(("concat_mla_k", {name: {"strides": (128, 2**31 // 112 // 16 * 16, 1)}}, name,
       f"strides below {2**31 // 112 // 16 * 16}") for name in ("k", "k_nope")),
    # Diffusion transformers: for most of it FlashInfer ends the process.
    *((DIT[2:], {part: {"strides": (3 * 3072, 3072, 1)}}, part, "one of 6 parts")
      for part in ("gate", "scale", "shift")),
    (DIT, {"input": {"shape": (2, 3, 2048)}}, "input", "shape [n, num_rows, 3072]"),
    *((DIT[2], {f"{part}_bias": {"shape": (3071,)}}, f"{part}_bias", "3072")
      for part in ("gate", "scale", "shift")),
    *(("fused_qk_rmsnorm_rope", change, argument, words)
      for change, argument, words in (
        ({"seq_len": 29}, "seq_len", "seq_len = ppf * pph * ppw"),
        ({"pph": 5}, "seq_len", "seq_len = 30, ppf = 2, pph = 5, ppw = 5"),
        ({"num_frame_channels": 48}, "num_frame_channels", "num_width_channels = head_dim"),
        ({"num_width_channels": 43}, "num_width_channels", "a multiple of 2"),
        ({"attention_factor": 1.1}, "attention_factor", "1.0, or a factor that is not"),
        ({"attention_factor": 1.1, "factor": 1 + 1e-9}, "attention_factor", "or a factor that"),
        ({"output_fp8": True}, "output_fp8", "if and only if"),
        ({"num_tokens": 8}, "num_tokens", "7, the size of n"),
        ({"ppw": 0}, "ppw", "1 or more"),
        ({"ppf": 2**31}, "ppf", "2147483647 or less"),
        ({"num_heads_q": 33}, "", "num_heads_q = 33 of at most 32"),
        ({"num_heads_k": 33}, "", "num_heads_k = 33 of at most 32"),
        ({"num_heads_v": 33}, "", "num_heads_v = 33 of at most 32"))),
    ("layernorm", {"n": 2**20 + 1, "h": 4096}, "", "offsets below 4294967296"),
    ("layernorm", {"n": 2**20, "h": 2049}, "input", "2147483648 elements in rows of an odd size"),
    # Blocks with a scale each.
    ("nvfp4_kv_dequant", {"blocks": 48 * 1024 - 3}, "", f"of at most {48 * 1024 - 4}"),
    *(("block_scale_interleave", {"rows": 100, "cols": 3, "swizzled": wrong, "n": 1},
       "interleavedBlockScale", "whole tiles of 128 rows and 4 columns")
      for wrong in (0, 511, 513, 1024)),
    ("block_scale_interleave_reverse", {"rows": 100, "cols": 4}, "", "multiple of 128"),
    ("block_scale_interleave_reverse", {"rows": 128, "cols": 3}, "", "multiple of 4"),
    *(("mxfp8_quantize", {"n": 5, "k": 64, "padded_k": 64, "num_scales": 512} | change, name, "")
      for change, name in (
        ({"alignment": 128}, "valMxFP8"), ({"padded_k": 96}, "valMxFP8"),
        ({"num_scales": 511}, "scaleFP8SF"), ({"sfSwizzleLayout": 2}, "scaleFP8SF"),
        ({"sfSwizzleLayout": 3}, "sfSwizzleLayout"), ({"alignment": 48}, "alignment"))),
    *(("fp4_quantize", change, name, "") for change, name in (
        ({"sfVecSize": 32}, "sfVecSize"), ({"sfUseUE8M0": True}, "sfVecSize"),
        ({"globalScale": None}, "globalScale"), ({"isSfSwizzledLayout": False}, "scaleFP8SF"),
        ({"isSf8x4Layout": True}, "scaleFP8SF"))),
    ("fp4_quantize", {"half": 40, "sfVecSize": 32, "sfUseUE8M0": True}, "input",
     "whole blocks of sfVecSize"),
    # Bits.
    *(("packbits", {"n": 13, "num_bytes": count}, "y", "a byte for every 8 bits begun")
      for count in (0, 1, 3, 100)),
    ("packbits", {"n": 2**31 * 2048, "num_bytes": 2**31 * 256}, "x",
     f"n = {2**42} of at most {_INT * 2048}"),
    *((("packbits", "segment_packbits"), {"bitorder": wrong}, "bitorder", "'big' or 'little'")
      for wrong in ("Big", "", None, 0, True, b"big", "big ", ["big"])),
    *(("packbits", {"x": {"dtype": dtype}}, "x", "bool") for dtype in ("uint8", "int8", "float16")),
    # Samplers and filters.
    (SAMPLERS, {"n": 5, "r": 3, "maybe_indices": None, "maybe_top_k_arr": None,
                "maybe_min_p_arr": None}, "output", "maybe_indices"),
    ("top_k_sampling_from_probs", {"n": 5, "r": 3}, "maybe_top_k_arr", "as long as `output`"),
    ("min_p_sampling_from_probs", {"n": 5, "r": 3}, "maybe_min_p_arr", "as long as `output`"),
    (("top_k_sampling_from_probs", "top_k_top_p_sampling_from_probs"),
     {"maybe_top_k_arr": {"dtype": "int64"}}, "maybe_top_k_arr", "int32"),
    *(("top_p_renorm_probs", {"top_p_val": p, "maybe_top_p_arr": None}, "top_p_val", "")
      for p in (1.0000001, 1.5, 3.99, np.inf, np.nan)),
    (WHOLE_ROWS[:3], {"workspace_size": 1024}, "", "1048576 bytes or more"),
    ("top_p_renorm_probs", {"n": 5, "h": 4096, "workspace_size": 1024}, "workspace",
     f"{fi_ffi.top_p_renorm_workspace_size(5, 4096)} bytes or more"),
    *(("chain_speculative_sampling", change, name, "") for name, change in (
        ("target_probs", {"target_probs": {"shape": (4, 3, 24)}}),
        ("draft_token_ids", {"draft_token_ids": {"dtype": "int64"}}),
        ("output_accepted_token_num", {"output_accepted_token_num": {"shape": (5,)}}),
        ("output_token_ids", {"output_token_ids": {"shape": (4, 3)}}))),
    # The greatest of each row.
    *((PLAIN, {"top_k": wrong, "output_indices": {"shape": (4, 10)},
               "output_values": {"shape": (4, 10)}}, "top_k", "") for wrong in (9, 11, 0, -1)),
    *((PLAIN, {"d": 3000, "output_indices": {"shape": (4, 2100)}, option: value,
               "output_values": {"shape": (4, 2100)}}, "top_k", f"2048 at most with `{option}`")
      for option, value in (("sorted_output", True), ("tie_break", 1), ("dsa_graph_safe", True))),
    (PLAIN, {"tie_break": 3}, "tie_break", "2 or less"),
    (PLAIN, {"d": 3, "top_k": 5}, "", "d of at least top_k"),
    (PAGES, {"b": 3, "maybe_row_to_batch": None}, "src_page_table", "maybe_row_to_batch"),
    (PAGES, {"m": 23}, "src_page_table", "m of at least d"),
    # The gated delta rule.
    *(("gdn_prefill", {f"num_{of}_heads": count for of, count in zip(
        ("q", "k", "v", "sab"), counts, strict=True)}, argument, words)
      for counts, argument, words in (
        ((4, 4, 2, 4), "k", "num_k_heads = 2, the min of num_q_heads = 4 and num_v_heads = 2"),
        ((2, 4, 4, 4), "k", "num_k_heads = 2, the min of"),
        ((3, 2, 2, 3), "output", "num_sab_heads = 3 to be a multiple of num_k_heads = 2"),
        ((2, 2, 3, 3), "output", "num_sab_heads = 3 to be a multiple of num_k_heads = 2"),
        ((2, 2, 4, 2), "output", "num_sab_heads = 4, the max of"))),
    ("gdn_prefill", {"total_seq_len": 2, "num_seqs": 3}, "output",
     "total_seq_len of at least num_seqs = 3"),
    *(("gdn_prefill", {name: 0 if "every" in name else None}, name, "they go together")
      for name in ("state_checkpoints", "checkpoint_cu_starts", "checkpoint_every_n_tokens")),
    *(("gdn_prefill", {"checkpoint_every_n_tokens": n}, "checkpoint_every_n_tokens",
       "multiple of 64") for n in (1, 63, 65, 100)),
    ("gdn_prefill", {"workspace_size": 127}, "workspace_buffer", "128 bytes or more"),
    ("gdn_prefill", {"output": "v"}, "output", "memory apart"),
    # Attention states and paged caches.
    (MERGES[:2], {"num_heads": 129}, "", "one thread block covers them"),
    ("merge_states", {"num_heads": 129, "n": 3, "num_index_sets": 2}, "v", "1024 threads"),
    ("merge_states", {"num_heads": 2**16, "n": 1, "num_index_sets": 2}, "",
     "num_heads = 65536 of at most 65535"),
    ("merge_state", {"n": 2**20 + 1, "num_heads": 32, "head_dim": 128}, "",
     "offsets below 4294967296"),
    *((APPENDS[0], {"T": dtype, "head_dim": dim, "num_kv_heads": most + 1}, "",
       f"num_kv_heads of at most {most}: one thread") for dtype, dim, most in MOST_HEADS),
    (APPENDS, _MOST_PAGES | {"num_indices": 2**32 // 48 + 1}, "", " of at most"),
    (APPENDS, {"nnz": 2**31 - 2**10 + 1}, "", "nnz = 2147482625 of at most 2147482624"),
    *((APPENDS, {axis: 0}, "", f"{axis} of at least 1, for nnz")
      for axis in ("num_pages", "num_indices", "b")),
    # Products.
    ("bmm_fp8", {"A": {"dtype": "float8_e5m2"}, "B": {"dtype": "float8_e5m2"}}, "A",
     "got float8_e5m2"),
    ("bmm_fp8", {"B": {"strides": (32 * 16, 16, 1)}}, "B", "transposed"),
    # The launcher counts the elements of one in an int, where there are several.
    ("bmm_fp8", {"m": 2**27, "k": 16, "n": 16}, "A", "where there are several"),
    ("bmm_fp8", {"m": 1, "k": 2**24, "n": 128}, "B", "where there are several"),
    ("bmm_fp8", {"m": 2**24, "k": 16, "n": 128}, "D", "where there are several"),
    (("tinygemm2", "tinygemm2_nobias"), {"k": 1088}, "input", "wrong results"),
    (ROUTERS, {"n": 17}, "mat_a", "n = 17 of at most 16"),
    *(("fp8_quantize_1x128", {"n": 5, "n4": room}, "outScaleFP8SF", "rounded up to a multiple of 4")
      for room in (4, 5, 12)),
]  # fmt: skip

# Ops, and changes that leave them right.
FINE: list[tuple[Any, Mapping[str, Any]]] = [
    *((ANGLES, {"head_dim": dim, "rotary_dim": part, "interleave": way})
      for dim, way, step in ((64, False, 16), (64, True, 8), (256, True, 8), (512, False, 32),
                             (512, True, 16)) for part in (0, step, dim - step, dim)),
    (LLAMA_31, {"low_freq_factor": 1.0, "high_freq_factor": 1.25}),
    *((COS_SIN, {"head_dim": dim, "rotary_dim": part, "interleave": way}) for dim, part, way in (
        (128, 16, False), (128, 8, True), (512, 32, False), (96, 32, False), (96, 16, True),
        (80, 80, True), (40, 32, False))),
    (COS_SIN, {"max_seq_len": 2**26}),
    *((COS_SIN, {"head_dim": 1088, "rotary_dim": part, out: of, "interleave": way})
      for out, of in (("q_rope", "q"), ("k_rope", "k"))
      for part, way in ((32, False), (64, False), (128, False), (256, False), (512, False),
                        (96, True), (544, True))),
    (APPLY, {"num_qo_heads": 2**14}),
    (APPLY, {"q_rope": "q", "k_rope": "k"}),
    (QUANTISE, {"rope_dim": 16, "interleave": True}),
    (QUANTISE, {"no_rope_dim": 128}),
    (QUANTISE[:2], {"no_rope_dim": 0}),
    (QUANTISE[0], {"no_rope_dim": 48}),
    *((QUANTISE[0], {"rope_dim": 64, "no_rope_dim": rest, "num_kv_heads": 1, "num_qo_heads": most})
      for rest, most in ((48, 2**15 - 2), (0, 2**16 - 2))),
    (COS_SIN, {"head_dim": 96, "rotary_dim": 64, "num_kv_heads": 1, "num_qo_heads": 2**15 - 2}),
    *(("softmax", {"n": n, "h": h, "workspace_size": 2**20})
      for n, h in ((128, 2**23), (129, 2**24), (1, 2**27))),
    ("concat_mla_k", {"n": 2**24}),
    (MERGES, {"num_heads": 128}),
    ("merge_states", {"num_heads": 129, "n": 2, "num_index_sets": 2}),
    *((APPENDS[0], {"T": dtype, "head_dim": dim, "num_kv_heads": most})
      for dtype, dim, most in MOST_HEADS),
    *((APPENDS, sizes) for sizes in (_MOST_PAGES, {"nnz": 2**31 - 2**10})),
    # Strides have a limit; offsets are added up in 64 bits.
    *((APPENDS, {"T": "float8_e4m3fn", axis: size})
      for axis, size in (("num_pages", 2**31), ("nnz", 2**30))),
    # Nothing is read.
    *((APPENDS, {"nnz": 0, axis: 0}) for axis in ("num_pages", "num_indices", "b")),
    ("fused_qk_rmsnorm_rope", {"attention_factor": 1.1, "factor": 1.5}),
    (SAMPLERS, {"n": 5, "r": 3, "maybe_top_k_arr": None, "maybe_min_p_arr": None}),
    ("top_p_sampling_from_probs", {"n": 5, "r": 3}),
    (SAMPLERS, {"n": 2, "r": 3, "maybe_indices": None}),
    (PLAIN, {"d": 3000, "output_indices": {"shape": (4, 2048)}, "sorted_output": True,
             "output_values": {"shape": (4, 2048)}}),
    (PAGES, {"b": 2}),
    ("gdn_prefill", {"alpha": "beta"}),  # what is only read may be the same
    ("gdn_prefill", {"output_state": "input_state"}),
    ("bmm_fp8", {"b": 1, "m": 2**27, "k": 16, "n": 16}),
    # More elements than an int32 counts.
    *(("layernorm", {"n": n, "h": h})
      for n, h in ((2**20, 4096), (175_000, 12_288), (2**20, 2047))),
    (("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "rmsnorm_quant",
      "fused_add_rmsnorm_quant"), {"n": 175_000, "h": 12_288}),
    ("qk_rmsnorm", {"n": 16_800, "k": 1024, "h": 128}),
    (DIT[0], {"gate_bias": None}),
    *((DIT[2], {f"{part}_bias": None}) for part in ("gate", "scale", "shift")),
    # Draws of one row.
    ((*SAMPLERS, "sampling_from_logits"), {"n": 5_000_000, "r": 1, "h": 128256,
     "maybe_top_k_arr": None, "maybe_min_p_arr": None}),
    (("tinygemm2", "tinygemm2_nobias"), {"k": 1024}),
    *((name, {}) for name in OPS),
]  # fmt: skip


def _rows(table: list[Any]) -> list[Any]:
    """One for each op."""
    return [
        (name, *rest) for names, *rest in table
        for name in ((names,) if isinstance(names, str) else names)
    ]  # fmt: skip


def _by_op(table: list[Any]) -> dict[str, list[Any]]:
    """The rows of each op, without its name."""
    found: dict[str, list[Any]] = {}
    for name, *rest in _rows(table):
        found.setdefault(name, []).append(rest)
    return found


@pytest.mark.parametrize(("name", "rows"), _by_op(REFUSED).items(), ids=_by_op(REFUSED))
def test_is_refused(name, rows):
    """By a call and where it is prepared, in the same words; `argument` "" leaves it open."""
    op = OPS[name]
    for change, argument, words in rows:
        values = described(op.row, **change)
        error = refusal_of(op.row, values)
        assert error is not None, f"{name} is fine: {change}"
        assert words in str(error), error
        assert error.op == name and argument in ("", error.argument), error
        for use in (op, op.prepare):
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                use(**values)
            assert same_error(caught.value, error)


@pytest.mark.parametrize(("name", "rows"), _by_op(FINE).items(), ids=_by_op(FINE))
def test_is_fine(name, rows):
    row = OPS[name].row
    for (change,) in rows:
        assert refusal_of(row, described(row, **change)) is None, (name, change)


@pytest.mark.parametrize("name", QUANTISE)
def test_arguments_that_an_op_does_not_have(name):
    """Those of the other kind of cache are no parameters, and the entry gets nothing for them."""
    op = OPS[name]
    absent = [arg.name for arg in op.row.args if arg not in op.row.given]
    of_mla = ["v_in", "k_cache", "v_cache", "kv_layout"]
    assert absent == {KV: ["ckv_cache", "kpe_cache"], MLA: of_mla}.get(name, [])
    values = described(op.row)
    told = str(op.prepare(**values))
    for argument in absent:
        with pytest.raises(TypeError, match=argument):
            op(**values, **{argument: values["q_rope_in"]})
        assert f" {argument}=" not in told


_FLOAT8 = {"dtype": "float8_e4m3fn"}
# Ops, two releases after one another, and what is right since the second.
SINCE: list[Any] = [
    ("concat_mla_k", "0.6.10", "0.6.11", dict.fromkeys(("k", "k_nope", "k_rope"), _FLOAT8)),
    (DIT, "0.6.10", "0.6.11", {}),
    ("fused_qk_rmsnorm_rope", "0.6.11", "0.6.12", {}),
    (("tinygemm2", "tinygemm2_nobias"), "0.6.13", "0.6.14", {"k": 5120}),
    (GATED, "0.7.0", "0.7.1", {"d": 3420}),
]


@pytest.mark.parametrize(("name", "before", "since", "change"), _rows(SINCE))
def test_what_came_with_a_release(name, before, since, change):
    (row,) = (row for row in OPS[name].rows if fits(row, since))
    assert refusal_of(row, described(row, **change)) is None
    older = [row for row in OPS[name].rows if fits(row, before)]
    assert bool(older) == bool(change)
    assert all(refusal_of(row, described(row, **change)) for row in older)


def test_page_tables_of_shared_rows_are_refused():
    """But where blocks take their time: what FlashInfer's launcher decides, on an H100."""
    (rule,) = (rule for rule in OPS[PAGES].row.rules if rule.argument == "deterministic")
    (holds,) = rule.using.values()
    h100, small = 227 << 10, 99 << 10
    unordered = (False, 0, False)
    for size, most in (("float32", 57592), ("bfloat16", 115184), ("float16", 115184)):
        assert holds(1, most, 2049, size, h100, *unordered)
        assert not holds(1, most + 8, 2049, size, h100, *unordered)
        assert not holds(1, most + 8, 2048, size, h100, *unordered)
        for ordered in ((True, 0, False), (False, 1, False), (False, 0, True)):
            assert holds(1, most + 8, 2048, size, h100, *ordered)
    # Many rows of floats are taken by a block each, where it has the memory for that.
    assert holds(9, 131072, 2048, "float32", h100, *unordered)
    assert not holds(8, 131072, 2048, "float32", h100, *unordered)
    assert not holds(9, 131072, 2048, "float32", small, *unordered)
    assert not holds(1, 30000, 100, "float32", small, *unordered)


@pytest.mark.parametrize("name", [*WHOLE_ROWS[1:3], *TOP_KS[::2]])
def test_rows_that_blocks_would_wait_for_without_end(name, gpu, rng):
    """A row shared by more blocks than may run at once: here, on 4 multiprocessors."""
    row = OPS[name].row
    for size, is_right in ((60000, True), (60001, False)):
        sizes = {**inputs_of(row).small, "n": 1, "h": size, "d": size, "workspace_size": 2**20}
        optional = {"maybe_top_k_arr"} & {arg.name for arg in row.tensors}
        case = make_case(row, sizes, {"T": "float32"}, rng, without=optional)
        placed = {key: gpu.place(array) for key, array in case.arrays.items()}
        descs = {key: array.desc() for key, array in placed.items()}
        if is_right:
            OPS[name](**descs, **case.scalars, stream=gpu.stream)
        else:
            argument = row.tensors[0].name
            with pytest.raises(fi_ffi.ArgumentError, match=f"`{argument}`.*multiprocessor"):
                OPS[name](**descs, **case.scalars, stream=gpu.stream)
