"""What vLLM's users run into, by name: the cause, what to do, and the entries to judge.

The words follow FlashInfer's sources (the files are named); what a GPU and a release have is
looked up in the same records as of any op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fi_ffi.ops.capability.attention import SAMPLES, judge_attention
from fi_ffi.ops.capability.judgement import Query, Support, judge
from fi_ffi.ops.capability.matrix import entry_row

_Judge = Callable[[Query], Support]


@dataclass(frozen=True)
class KnownIssue:
    """A thing that goes wrong: why, and what helps; `judges` tell what a GPU has of it."""

    name: str
    title: str
    cause: str
    advice: str
    # Entries it is about, as module.symbol, all of them in the record of exports.
    entries: tuple[str, ...]
    judges: tuple[_Judge, ...]

    def found(self, query: Query) -> list[Support]:
        return [judge(query) for judge in self.judges]


def _entry(module: str, symbol: str, releases: str = ">=0.6.3", *capabilities: int) -> _Judge:
    row = entry_row(module, symbol, releases, capabilities)
    return partial(judge, row.name, [row])


def _sinks(backend: str) -> _Judge:
    options = SAMPLES["BatchPrefillPlan"][f"{backend}, attention sinks"]
    return partial(judge_attention, "BatchPrefillPlan", options=options)


_MOE = "fused_moe_90"
_INTERLEAVE = "interleave_moe_weights_for_sm90_mixed_gemm"

MXFP4 = KnownIssue(
    "mxfp4-moe",
    "MXFP4 mixture of experts on SM90",
    "Hopper's tensor cores have no 4-bit floats. `fused_moe_90` has kernels for FP4 weights with "
    "float16 or bfloat16 activations only; for fp8 or MXFP8 activations with FP4 weights it has "
    "neither a Hopper nor an Ampere kernel (`isValidHopperMOESpecialisation` in "
    "moe_tma_warp_specialized_traits.h). TensorRT-LLM's FP4 kernels "
    "(`fused_moe_trtllm_sm100`) are for SM100 and later. Even the kernels that there are were "
    "compiled in only if nvcc was of CUDA 12.8 or later (`ENABLE_FP4`).",
    "On SM90 keep the activations in float16 or bfloat16: `fi_ffi.cutlass_fused_moe` with "
    "`use_w4_group_scaling=True`, and the weights (uint8, two in each) and their scales rearranged "
    "once by `fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm` and `..._scales_...`. The entry "
    "that rearranges is in FlashInfer from 0.6.10 on.",
    (f"{_MOE}.init", f"{_MOE}.{_INTERLEAVE}", "fused_moe_trtllm_sm100.trtllm_fp4_block_scale_moe"),
    (
        _entry(_MOE, "init", ">=0.6.3", 9),
        _entry(_MOE, _INTERLEAVE, ">=0.6.10", 9),
        _entry("fused_moe_trtllm_sm100", "trtllm_fp4_block_scale_moe", ">=0.6.3", 10, 12),
    ),
)

FP8_MOE = KnownIssue(
    "fp8-moe-cuda",
    "fp8 MoE and GEMM compiled with an older CUDA than the machine's",
    "Whether a kernel file has DeepSeek's fp8 block scaling is settled when it is compiled: the "
    "generators pass `ENABLE_FP8_BLOCK_SCALE` to nvcc of CUDA 12.8 or later, and without it every "
    "call ends in \"fp8 blockscale gemm only supported on cuda version 12.8 or higher\" "
    "(fp8_blockscale_gemm.cu). That is the version the file was compiled with: a newer driver or "
    "toolkit on the machine changes nothing. FP4 weights in `fused_moe_90` depend on it in the "
    "same way, and so do scales of fp8 activations beside MXFP4 weights, which an older compiler "
    "leaves 0 (`CUDART_VERSION >= 12080` in cutlass_fused_moe_kernels.cuh). FlashInfer's Python "
    "asks something else, the nvcc of the machine or where there is none torch's CUDA, and may "
    "refuse what the file can do, or try what it cannot. "
    "And there are two kinds of these kernels: those in the file, and DeepGEMM's, which the file "
    "compiles at the first call of each size once `set_deepgemm_jit_include_dirs` told it where "
    "the headers are (FlashInfer's Python does): by nvcc, which `TRTLLM_DG_NVCC_COMPILER` names, "
    "or `CUDA_HOME`, or PATH (deep_gemm/compiler.cuh). Where there is none, or one of a CUDA newer "
    "than the driver's, such calls fail.",
    "Look at the file's own CUDA, not at the machine's: the tag in its wheel's name: from "
    "cu128 on the switches are on. fi_ffi asks no other version. It leaves "
    "DeepGEMM off, so that nothing is compiled; to have it, install nvcc (`pip install "
    "'cuda-toolkit[nvcc,cccl]==13.0.*'`) and give `set_deepgemm_jit_include_dirs` the folder "
    "`flashinfer/data/csrc/nv_internal/tensorrt_llm` of the flashinfer-python wheel.",
    (
        f"{_MOE}.init", f"{_MOE}.set_deepgemm_jit_include_dirs", "fp8_blockscale_gemm_90.init",
        "fp8_blockscale_gemm_90.set_deepgemm_jit_include_dirs",
    ),
    (
        _entry(_MOE, "init", ">=0.6.3", 9),
        _entry("fp8_blockscale_gemm_90", "init", ">=0.6.3", 9),
    ),
)  # fmt: skip

SINKS = KnownIssue(
    "attention-sinks",
    "Attention sinks on Hopper (gpt-oss)",
    "Sinks are compiled into modules of their own, which FlashInfer builds ahead of time for heads "
    "of 64 elements, float16 and bfloat16, with and without a sliding window: for fa3 (SM90) and "
    "for fa2. Other head sizes are left to its compiler at run time. They have no fp8 keys, soft "
    "caps, position encodings or custom masks, and `batch_decode` has no sinks at all. The "
    "sinks of TensorRT-LLM's attention (`fmha_gen`) are for SM100 and later; `xqa` has them too.",
    "`fi_ffi.BatchPrefillPlan(..., use_attention_sink=True)`, also for decoding (one query a "
    "request). For another head size: `fi-ffi build` with the module's name, which "
    "`supports(...).build` gives.",
    (),
    (_sinks("fa3"), _sinks("fa2"), _entry("xqa", "xqa_wrapper", ">=0.6.3", 9, 10, 12)),
)

ALL_REDUCE = KnownIssue(
    "all-reduce-fusion",
    "All-reduce fused with RMSNorm",
    "`trtllm_comm` has the fused kernels and `trtllm_mnnvl_comm` those over NVLink fabrics. Both "
    "are compiled for SM90 as well (`supported_major_versions=[9, 10]` in jit/comm.py), but "
    "FlashInfer lists them only where SM100 is among the targets: the published wheels, which "
    "are for all GPUs, have SM90 code in them, and a wheel that was made for SM90 alone lacks "
    "them. For SM110 and SM12x there is none. `vllm_comm` (vLLM's custom all-reduce) and "
    "`comm` (the MoE all-to-all) are for every GPU, and fuse nothing.",
    "Use a published wheel, or name the module: `fi-ffi build --arch 9.0a trtllm_comm`. The "
    "workspace, shared between processes over CUDA IPC, is the caller's to make.",
    (
        "trtllm_comm.trtllm_allreduce_fusion", "trtllm_comm.trtllm_moe_allreduce_fusion",
        "trtllm_mnnvl_comm.trtllm_mnnvl_allreduce_fusion", "vllm_comm.all_reduce", "comm.moe_comm",
    ),
    (
        _entry("trtllm_comm", "trtllm_allreduce_fusion"),
        _entry("trtllm_mnnvl_comm", "trtllm_mnnvl_allreduce_fusion"),
        _entry("vllm_comm", "all_reduce"),
        _entry("comm", "moe_comm"),
    ),
)  # fmt: skip

KNOWN_ISSUES = (MXFP4, FP8_MOE, SINKS, ALL_REDUCE)
