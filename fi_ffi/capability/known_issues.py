"""Known problems in vLLM, by name: the cause, the solution, and the entries to judge.

The causes follow FlashInfer's sources; what a GPU and a release have comes from the same records
as for any op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fi_ffi.capability.attention import SAMPLES, judge_attention
from fi_ffi.capability.judgement import Query, entry_row, judge
from fi_ffi.ops.call.support import Support

_Judge = Callable[[Query], Support]


@dataclass(frozen=True)
class KnownIssue:
    """A problem: its cause and remedy; `judges` determine what a GPU supports."""

    name: str
    title: str
    cause: str
    advice: str
    # The entries concerned, as module.symbol, all of them in the record of exports.
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
    "float16 or bfloat16 activations, and none for fp8 or MXFP8 activations. TensorRT-LLM's FP4 "
    "kernels (`fused_moe_trtllm_sm100`) are for SM100 and later. A wheel compiled with nvcc before "
    "CUDA 12.8 has no FP4 kernels at all.",
    "On SM90, keep the activations in bfloat16 and call `fi_ffi.cutlass_fused_moe` with "
    "`use_w4_group_scaling=True`. Rearrange weights and scales once with "
    "`fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm` and "
    "`fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm` (FlashInfer 0.6.10 and later).",
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
    "DeepSeek's fp8 block scaling is compiled in only by nvcc of CUDA 12.8 or later. In a file "
    'that an older nvcc compiled, every call ends in "fp8 blockscale gemm only supported on cuda '
    'version 12.8 or higher"; a newer driver or toolkit does not help. The same holds for FP4 '
    "weights in `fused_moe_90`. FlashInfer's Python checks the machine's nvcc or torch's CUDA "
    "instead of the file's, so it may refuse calls that would work. DeepGEMM's kernels, which "
    "`set_deepgemm_jit_include_dirs` enables, are compiled by nvcc at the first call of each "
    "size; such calls fail without nvcc, or if nvcc is newer than the driver.",
    "Take a wheel with the tag cu128 or later: fi_ffi looks at the file's CUDA only. fi_ffi "
    "leaves DeepGEMM off. To use it, install nvcc (`pip install "
    "'cuda-toolkit[nvcc,cccl]==13.0.*'`) and pass the folder "
    "`flashinfer/data/csrc/nv_internal/tensorrt_llm` of the flashinfer-python wheel to "
    "`set_deepgemm_jit_include_dirs`.",
    (
        f"{_MOE}.init",
        f"{_MOE}.set_deepgemm_jit_include_dirs",
        "fp8_blockscale_gemm_90.init",
        "fp8_blockscale_gemm_90.set_deepgemm_jit_include_dirs",
    ),
    (
        _entry(_MOE, "init", ">=0.6.3", 9),
        _entry("fp8_blockscale_gemm_90", "init", ">=0.6.3", 9),
    ),
)

SINKS = KnownIssue(
    "attention-sinks",
    "Attention sinks on Hopper (gpt-oss)",
    "Sinks have modules of their own. FlashInfer publishes them for heads of 64 elements, float16 "
    "and bfloat16, with and without a sliding window, for fa3 (SM90) and fa2. They support no fp8 "
    "keys, soft caps, position encodings or custom masks. `batch_decode` has no sinks; `xqa` has, "
    "and TensorRT-LLM's attention (`fmha_gen`) has on SM100 and later.",
    "`fi_ffi.BatchPrefillPlan(..., use_attention_sink=True)`, also for decoding, with one query "
    "for each request. For another head size, run the `fi-ffi build` command in "
    "`supports(...).build`.",
    (),
    (_sinks("fa3"), _sinks("fa2"), _entry("xqa", "xqa_wrapper", ">=0.6.3", 9, 10, 12)),
)

ALL_REDUCE = KnownIssue(
    "all-reduce-fusion",
    "All-reduce fused with RMSNorm",
    "`trtllm_comm` has the fused kernels, and `trtllm_mnnvl_comm` those for NVLink fabrics. "
    "FlashInfer lists both only if SM100 is among the targets: the published wheels have their "
    "SM90 code, but a wheel made for SM90 alone lacks them. There is none for SM110 and SM12x. "
    "`trtllm_mnnvl_comm` needs multicast memory, which fi_ffi does not make. `vllm_comm` and "
    "`comm` run on every GPU and fuse nothing.",
    "Use a published wheel, or name the module: `fi-ffi build --arch 9.0a trtllm_comm`. "
    "`fi_ffi.comm.Group` makes the workspaces of `trtllm_comm` and `vllm_comm` and calls them.",
    (
        "trtllm_comm.trtllm_allreduce_fusion",
        "trtllm_comm.trtllm_moe_allreduce_fusion",
        "trtllm_mnnvl_comm.trtllm_mnnvl_allreduce_fusion",
        "vllm_comm.all_reduce",
        "comm.moe_comm",
    ),
    (
        _entry("trtllm_comm", "trtllm_allreduce_fusion"),
        _entry("trtllm_mnnvl_comm", "trtllm_mnnvl_allreduce_fusion"),
        _entry("vllm_comm", "all_reduce"),
        _entry("comm", "moe_comm"),
    ),
)

KNOWN_ISSUES = (MXFP4, FP8_MOE, SINKS, ALL_REDUCE)
