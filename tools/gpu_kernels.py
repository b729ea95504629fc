"""The kernel modules that the GPU tests are run with, by name, one a line.

    python tools/gpu_kernels.py [--release 0.7.2.post1] [core | options | gdn | rest | moe]

`core` is what most tests need; `options` has a module for every option that FlashInfer
compiles in: sliding windows, soft caps, position encodings, fp8, head sizes that differ;
`gdn` is the gated delta rule's prefill, which alone takes a quarter of an hour to build;
`rest` is everything else that a decoder needs: activations, RoPE, sampling, GEMMs and so on;
`moe` is the fused mixture of experts, 182 sources.

What the release does not have is left out, with a word on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from fi_ffi.errors import ArgumentError
from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.module_names import parse, uri
from fi_ffi.ops.attention.rows import MLA_FP8

_HEAD_DIMS = (64, 128, 256)
# The releases whose sources compile for these parameters, where it is not every one that names
# such a module.
_OF = "releases"
_OPTIONS = (
    {"use_sliding_window": True},
    {"use_logits_soft_cap": True},
    {"pos_encoding_mode": 1},
    {"pos_encoding_mode": 2},
    {"dtype_kv": "e4m3"},
)


def _core() -> Iterator[tuple[str, dict[str, object]]]:
    for head_dim in _HEAD_DIMS:
        for family in ("single_decode", "batch_decode", "batch_prefill"):
            yield family, {"dtype_q": "f16", "head_dim_qk": head_dim}
        yield "batch_prefill", {"dtype_q": "f16", "head_dim_qk": head_dim, "backend": "fa3"}
    for backend in ("fa2", "fa3"):
        yield "single_prefill", {"dtype_q": "f16", "head_dim_qk": 128, "backend": backend}
        yield "batch_prefill", {"dtype_q": "bf16", "head_dim_qk": 128, "backend": backend}
        yield "batch_mla", {"dtype_q": "bf16", "backend": backend}
        for window in (False, True):
            options = {"dtype_q": "bf16", "head_dim_qk": 64, "use_sliding_window": window}
            yield "batch_prefill_with_attention_sink", options | {"backend": backend}
    yield "single_decode", {"dtype_q": "bf16", "head_dim_qk": 128}
    yield "batch_decode", {"dtype_q": "bf16", "head_dim_qk": 128}


def _options() -> Iterator[tuple[str, dict[str, object]]]:
    for option in _OPTIONS:
        for family in ("single_decode", "batch_decode", "single_prefill", "batch_prefill"):
            yield family, {"dtype_q": "f16", "head_dim_qk": 128} | option
    for option in _OPTIONS[:2]:
        yield "batch_prefill", {"dtype_q": "f16", "head_dim_qk": 128, "backend": "fa3"} | option
    fp8 = {"dtype_q": "e4m3", "dtype_o": "f16", "head_dim_qk": 128, "backend": "fa3"}
    yield "batch_prefill", fp8
    yield "batch_prefill", fp8 | {"use_sliding_window": True}  # right from 0.6.15 on
    yield "single_prefill", fp8
    for family in ("single_prefill", "batch_prefill"):
        yield family, fp8 | {"head_dim_qk": 64}
        for dtype in ("f16", "bf16"):
            yield family, {"dtype_q": dtype, "dtype_kv": "fp4", "head_dim_qk": 128}
    for backend, releases in MLA_FP8.items():
        cache = {"dtype_q": "bf16", "dtype_kv": "e4m3", "dtype_o": "bf16", "backend": backend}
        yield "batch_mla", cache | {_OF: releases}
    # What it gets wrong: tests/gpu/test_attention_wrong.py.
    alibi = {"pos_encoding_mode": 2, "use_logits_soft_cap": True}
    yield "single_prefill", {"dtype_q": "f16", "head_dim_qk": 128} | alibi
    for backend in ("fa2", "fa3"):
        apart = {"dtype_q": "bf16", "head_dim_qk": 192, "head_dim_vo": 128, "backend": backend}
        yield "batch_prefill", apart


def _rest() -> Iterator[tuple[str, dict[str, object]]]:
    yield "pod", {"dtype_q": "f16", "head_dim": 128}
    yield "batch_pod", {"dtype_q": "f16", "head_dim": 128}
    yield "batch_attention", {"dtype_q": "f16", "head_dim_qk": 128}
    xqa = {"head_dim": 128, "use_sliding_window": False}
    yield "xqa", xqa | {"input_dtype": "bf16", "page_size": 16, "head_group_ratio": 4}
    fp8 = {"input_dtype": "f16", "kv_cache_dtype": "e4m3", "use_sliding_window": True}
    yield "xqa", xqa | {"page_size": 64, "head_group_ratio": 8} | fp8
    out = {"output_dtype": "e4m3", "kv_cache_dtype": "e4m3", "input_dtype": "f16"}
    yield "xqa", xqa | fp8 | out | {"page_size": 64, "head_group_ratio": 8}
    yield "xqa", xqa | out | {"page_size": 64, "head_group_ratio": 8, "q_seq_len": 4}
    decode = {"dtype_q": "f16", "dtype_o": "e4m3", "head_dim_qk": 128}
    yield "single_decode", decode
    for keys in ("f16", "e4m3"):
        yield "batch_decode", decode | {"dtype_kv": keys}
    yield "selective_state_update", _SSU
    yield "selective_state_update", _SSU | {"ssu_arch": "sm90"}
    drafts = {"state_dtype": "bf16", "stateIndex_dtype": "i32", "ntokens_mtp": 4}
    yield "selective_state_update", _SSU | drafts | {"ssu_arch": "sm90"}
    for tokens in (1, 4):
        of = _SSU | {"stateIndex_dtype": "i32", "ntokens_mtp": tokens, "ssu_arch": "sm90"}
        int16 = {"state_dtype": "i16", "state_scale_dtype": "f32"}
        yield "selective_state_update", of | int16
        yield "selective_state_update", of | {"state_dtype": "f16", "philox_rounds": 10}


_SSU = {
    "state_dtype": "f32", "input_dtype": "bf16", "weight_dtype": "bf16", "matrixA_dtype": "f32",
    "stateIndex_dtype": "i64", "dim": 64, "dstate": 128, "ntokens_mtp": 1,
    "cu_seqlens_dtype": "i32", "num_accepted_tokens_dtype": "i32",
}  # fmt: skip
_PLAIN = {
    "core": ("norm", "page"),
    "gdn": ("gdn_prefill_sm90",),
    "moe": ("fused_moe_90",),
    "rest": (
        "silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "rope", "sampling", "cascade",
        "quantization", "topk", "gemm", "gemm_sm90", "fp8_blockscale_gemm_90", "concat_mla",
        "dsv3_router_gemm", "dsv3_fused_routing", "tinygemm2", "bgmv_moe", "mhc",
        "fp4_quantization_90", "fp4_kv_dequant", "api_log_stats", "trtllm_utils", "comm",
        "vllm_comm", "trtllm_comm", "spdlog", "mamba_seq_chunk_cumsum",
    ),
}  # fmt: skip
_FAMILIES = {"core": _core, "options": _options, "rest": _rest}


PARTS = tuple(sorted({*_PLAIN, *_FAMILIES}))


def names(parts: Iterable[str], release: str) -> Iterator[str]:
    """The modules of these parts, as a release calls them."""
    for part in parts:
        for name in _PLAIN.get(part, ()):
            if parse(name, release):
                yield name
            else:
                _leave_out(f"{name}: FlashInfer {release} has no such module")
        for family, parameters in _FAMILIES.get(part, tuple)():
            releases = str(parameters.pop(_OF, ">=0"))
            if not is_in(release, releases):
                _leave_out(f"{family}: {parameters} is of FlashInfer {releases}")
                continue
            try:
                yield uri(family, release=release, **parameters)
            except ArgumentError as error:
                _leave_out(f"{family} of FlashInfer {release}: {error}")


def _leave_out(why: str) -> None:
    print(f"left out: {why}", file=sys.stderr)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--release", default=the_lock().default_release)
    options.add_argument("parts", nargs="*", metavar="PART")
    given = options.parse_args()
    for name in names(given.parts or ["core", "options"], given.release):
        print(name)
