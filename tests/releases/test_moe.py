"""What `fi_ffi.ops.moe` declares against the sources of every release that is supported."""

from __future__ import annotations

import re

import pytest

from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.moe.activations import ACTIVATIONS, GATED, activation_numbers
from fi_ffi.ops.moe.interface import (
    FOLDED_RELEASES,
    INTERFACES,
    INTERLEAVE,
    MODULE,
    MODULES,
    W4_RELEASES,
    of_release,
)
from fi_ffi.ops.moe.modes import BLOCK, INT4_GROUP, MODES, MXFP4_GROUP, MXFP8, MXFP8_MXFP4, NVFP4

from tests.releases.bindings import RELEASES

_BACKEND = "csrc/fused_moe/cutlass_backend/"
_CUTLASS = "csrc/nv_internal/tensorrt_llm/kernels/cutlass_kernels/"
BINDING = f"{_BACKEND}flashinfer_cutlass_fused_moe_binding.cu"
_MAINLOOP = (
    "csrc/nv_internal/tensorrt_llm/cutlass_extensions/include/cutlass_extensions/gemm/collective/"
    "sm90_mma_array_tma_gmma_rs_warpspecialized_mixed_input_.hpp"
)
each_release = pytest.mark.parametrize("release", RELEASES)


@each_release
def test_methods_without_an_interface(release, interface):
    """What is there and not declared, nobody here calls."""
    names = interface(release).of_source(BINDING)
    methods = {name.rpartition(".")[2] for name in names if name.startswith("FusedMoeRunner.")}
    known = {"get_tactic_num", "run_moe_min_latency", "get_tactic_supports_activation_fusion"}
    assert methods - {*of_release(release).methods} <= known


@each_release
@pytest.mark.parametrize("releases", [W4_RELEASES, FOLDED_RELEASES])
def test_4_bit_weights(release, releases, sources, interface):
    """The order of weights, and what dispatches on steps of their rows, is that of the newest
    release of those that are said to share it."""
    names = [f"{_CUTLASS}moe_gemm/moe_gemm_mixed_utils.cu",
             f"{_CUTLASS}moe_gemm/moe_gemm_template_dispatch_tma_ws_mixed_dtype.h"]  # fmt: skip
    last = [one for one in RELEASES if is_in(one, releases)][-1]
    try:
        same = [sources(release, name) == sources(last, name) for name in names]
    except KeyError:
        same = [False]
    assert same[0] == is_in(release, releases)
    if same[0]:
        assert releases == FOLDED_RELEASES or all(same)
        interleave = interface(release).of(BINDING, "", INTERLEAVE.signature.name)
        assert interleave.signature.same_types(INTERLEAVE.signature)
        assert interleave.names == INTERLEAVE.names


@each_release
def test_folded_scales(release, sources):
    """The block of scales that a kernel copies, and how FlashInfer makes one."""
    try:
        text = sources(release, _MAINLOOP)
    except KeyError:
        text = ""
    assert ("WeightScaleLogicalMPerFoldBlock = 64;" in text) == is_in(release, FOLDED_RELEASES)
    if is_in(release, FOLDED_RELEASES):
        assert "WeightScaleLogicalKPerFoldBlock = 128;" in text
        python = sources(release, "fused_moe/prepare.py")
        assert ".permute(0, 1, 4, 3, 2, 5)" in python and "physical_cols = 128 //" in python


@each_release
def test_activations(release, sources):
    text = sources(release, f"{_CUTLASS}include/common.h")
    (inside,) = re.findall(r"enum class ActivationType \{(.*?)\}", text, re.DOTALL)
    names = re.findall(r"^\s*(\w+)(?: = \d+)?,?$", inside, re.MULTILINE)
    theirs = {name: number for number, name in enumerate(names)}
    ours = activation_numbers(release)
    assert {name: theirs[name] for name in ours} == ours
    assert not ({*ACTIVATIONS} - {*ours}) & {*theirs}
    header = sources(release, f"{_CUTLASS}include/moe_gemm_kernels.h")
    (body,) = re.findall(r"bool isGatedActivation\(.*?\{(.*?)\}", header, re.DOTALL)
    gated = {*re.findall(r"ActivationType::(\w+)", body)}
    assert gated & {*ACTIVATIONS} == GATED & {*ours}


@each_release
def test_numbers_of_tactics(release, sources):
    """Where a number of GEMM2's is taken as counted from 0, one that follows GEMM1's may be
    taken for another's."""
    text = sources(release, BINDING)
    relative = "absolute_id2 = mGemm1TacticCount + id2" in text
    assert relative != of_release(release).absolute_ids


@each_release
def test_groups_and_blocks(release, sources):
    header = sources(release, f"{_CUTLASS}include/moe_gemm_kernels.h")
    assert f"int4_group_size = {INT4_GROUP};" in header
    assert f"wfp4a16_group_size = {MXFP4_GROUP};" in header
    scales = sources(release, f"{_CUTLASS}fp8_blockscale_gemm/fp8_blockscale_gemm_kernel.cuh")
    for name in ("ScaleGranKA", "ScaleGranNB", "ScaleGranKB"):
        assert f"constexpr int {name} = {BLOCK};" in scales


@each_release
def test_modules_of_gpus(release, sources):
    """Which module FlashInfer takes on which GPU, and what each is compiled for."""
    text = sources(release, "fused_moe/core.py")
    chosen = text[text.index("def get_cutlass_fused_moe_module") :].partition("raise")[0]
    pattern = r"backend (?:in \((.*?)\)|== (.*?)):\s*module = gen_cutlass_fused_moe_sm(\d+)"
    found = re.findall(pattern, chosen)
    theirs = {name: arch for several, one, arch in found
              for name in re.findall(r"\d+", several or one)}  # fmt: skip
    ours = {(9, 0): MODULE, **MODULES}
    for (major, minor), module in ours.items():
        assert module == f"fused_moe_{theirs[f'{major}{minor}']}"
    assert {*theirs} - {f"{major}{minor}" for major, minor in ours} <= {"89", "107"}
    generators = sources(release, "jit/fused_moe.py")
    for (major, _), module in MODULES.items():
        start = generators.index(f"def gen_cutlass_fused_moe_sm{module.rpartition('_')[2]}_module")
        majors = re.findall(r"supported_major_versions=\[(.*?)\]", generators[start:])
        assert str(major) in majors[0].split(", ")


@each_release
def test_scales_of_blocks(release, sources):
    """Since when modes are as they are here, and how the binding counts scales."""
    text, header = (
        sources(release, BINDING),
        sources(release, f"{_CUTLASS}include/moe_gemm_kernels.h"),
    )
    assert f"NVFP4BlockScaleVectorSize = {NVFP4.blocks.size};" in header
    assert f"MXFPXBlockScaleVectorSize = {MXFP8.blocks.size};" in header
    assert ("isWMxfp8AMxfp8Quant" in text) == is_in(release, MXFP8.releases)
    counted = re.findall(r"alignToSfDim\(\s*inter_size, TmaWarpSpecializedGroupedGemmInput::(\w+)\)"
                         r"(?: \*\s*(\w+))?", text)  # fmt: skip
    gates = {f"{kind} * {times}" for kind, times in counted if times}
    plain = {"MinNDimAlignmentMXFPX * fc1_n_mult", "MinKDimAlignmentNVFP4 * 2"}
    if is_in(release, MXFP8_MXFP4.gateless):
        assert gates == plain
    else:
        assert "MinNDimAlignmentMXFPX * 2" in gates
    told = text.partition("mProfiler->init(")[2].partition(";")[0]
    assert ("mUseMxfp8ActScaling" in told) == is_in(release, MXFP8.profiled)
    kernels = sources(release, f"{_BACKEND}cutlass_fused_moe_kernels.cuh")
    # What MXFP8 times MXFP4 is multiplied with is taken from nowhere.
    assert "mxfp8_mxfp4.fc1.global_scale" not in kernels
    spans = {"", W4_RELEASES, FOLDED_RELEASES, MXFP8.releases}
    assert {mode.releases for mode in MODES} == spans


@each_release
def test_what_decides_of_fp8_and_fp4(release, sources):
    """docs/moe.md says which toolkit a module has to be compiled with."""
    text = sources(release, "jit/fused_moe.py")
    start = text.index("def gen_cutlass_fused_moe_sm90_module")
    flags = text[start : text.index("return gen_cutlass_fused_moe_module", start)]
    condition = ' if is_cuda_version_at_least("12.8") else ""'
    assert f'"-DENABLE_FP8_BLOCK_SCALE"{condition}' in flags
    assert '"-DENABLE_FP8",' in flags and '"-DENABLE_FP4"' in flags
    assert '"90"' in text[start:][:1200] and MODULE == "fused_moe_90"
    runtime = sources(release, "csrc/nv_internal/tensorrt_llm/deep_gemm/runtime.cuh")
    (body,) = re.findall(r"kJitUseNvcc = \[\]\(\)(.*?)\}\(\);", runtime, re.DOTALL)
    # What docs/moe.md says of it: nvcc, whatever the environment says.
    assert body.rstrip().endswith("return true;")


def test_the_default_releases_is_first():
    assert is_in(the_lock().default_release, INTERFACES[0].releases)
    for release in (*RELEASES, "0.6.19"):
        assert sum(is_in(release, one.releases) for one in INTERFACES) == 1, release
