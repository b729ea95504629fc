"""What `fi_ffi.ops.moe` declares against the sources of every release that is supported."""

from __future__ import annotations

import re

import pytest

from fi_ffi.loader.lock import the_lock
from fi_ffi.loader.sources import Bindings, Source, read
from fi_ffi.ops.moe.interface import (
    ACTIVATIONS,
    GATED,
    INTERFACES,
    INTERLEAVE,
    MODULE,
    SET_INCLUDE_DIRS,
    W4_RELEASES,
    activation_numbers,
    is_in,
    of_release,
)
from fi_ffi.ops.moe.modes import BLOCK, INT4_GROUP, MXFP4_GROUP

from tests.releases.bindings import RELEASES

_BACKEND = "csrc/fused_moe/cutlass_backend/"
_CUTLASS = "csrc/nv_internal/tensorrt_llm/kernels/cutlass_kernels/"
BINDING = f"{_BACKEND}flashinfer_cutlass_fused_moe_binding.cu"
# Beside those of the lock: the others whose interface is another than their neighbours'.
ALL = sorted({*RELEASES, "0.6.8", "0.6.9", "0.6.10", "0.6.14", "0.6.15", "0.6.16", "0.6.17"})
each_release = pytest.mark.parametrize("release", ALL)


def exported(release: str, sources) -> Bindings:
    found = Bindings()
    for name in (BINDING, f"{_BACKEND}deepgemm_jit_setup.cu"):
        more = read([Source(name, sources(release, name))], is_switch=lambda macro: True)
        found.exports |= more.exports
        found.objects |= more.objects
    return found


@each_release
def test_interfaces(release, sources):
    found = exported(release, sources)
    interface = of_release(release)
    functions = found.exports["init"], *found.objects["FusedMoeRunner"].values()
    named = {function.signature.name: function for function in functions}
    for function in (interface.init, *interface.methods.values()):
        theirs = named[function.signature.name]
        assert function.signature.same_types(theirs.signature), function.signature.name
        assert function.names == theirs.names
    # What is there and not declared, nobody here calls.
    rest = {*found.objects["FusedMoeRunner"]} - {*interface.methods}
    known = {"get_tactic_num", "run_moe_min_latency", "get_valid_tactics_for_shape",
             "get_tactic_supports_activation_fusion"}  # fmt: skip
    assert rest <= known
    dirs = found.exports["set_deepgemm_jit_include_dirs"]
    assert dirs.signature.same_types(SET_INCLUDE_DIRS.signature)


@each_release
def test_4_bit_weights(release, sources):
    """The order of weights is that of the default release where it is said to be."""
    default = the_lock().default_release
    names = [f"{_CUTLASS}moe_gemm/moe_gemm_mixed_utils.cu",
             f"{_CUTLASS}moe_gemm/moe_gemm_template_dispatch_tma_ws_mixed_dtype.h"]  # fmt: skip
    try:
        same = [sources(release, name) for name in names] == [sources(default, n) for n in names]
    except KeyError:
        same = False
    assert same == is_in(release, W4_RELEASES)
    if same:
        interleave = exported(release, sources).exports[INTERLEAVE.signature.name]
        assert interleave.signature.same_types(INTERLEAVE.signature)
        assert interleave.names == INTERLEAVE.names


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
    for release in (*ALL, "0.6.7", "0.6.18.post1", "0.6.19"):
        assert sum(is_in(release, one.releases) for one in INTERFACES) == 1, release
