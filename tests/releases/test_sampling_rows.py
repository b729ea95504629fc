"""What the rows of samplers and filters take from the kernels' sources, in each release."""

from __future__ import annotations

import re

import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits
from fi_ffi.ops.table import renorm, sampling, topk

from tests.releases.bindings import RELEASES


def row_of(name, release):
    return next(row for row in OPS[name].rows if fits(row, release))


def kernel(text: str, name: str) -> str:
    """From a kernel's parameters to the end of its body, white space as single blanks."""
    found = re.search(rf"\b{name}\(\s*DType\* .*?\n}}\n", text, re.DOTALL)
    assert found, name
    return " ".join(found[0].split())


@pytest.mark.parametrize("release", RELEASES)
def test_seeds(release, sources):
    """Whose seed an output has."""
    text = sources(release, "include/flashinfer/sampling.cuh")
    of_all, of_each = "seed_arr[0]", "seed_arr[bx * seed_stride]"
    for name in ("sampling_from_probs", "sampling_from_logits", "chain_speculative_sampling"):
        args = {arg.name: arg for arg in row_of(name, release).args}
        if "philox_seed" in args:
            assert of_all not in text and of_each not in text
        else:
            axes = args["maybe_seed_arr"].axes
            assert (axes == "1") == (of_all in text) == (of_each not in text)


@pytest.mark.parametrize("release", RELEASES)
def test_arrays_of_parameters(release, sources):
    """Read by output, or by row of the probabilities; k in the tokens' dtype."""
    text = sources(release, "include/flashinfer/sampling.cuh")
    read = {
        "top_k_sampling_from_probs": ("TopKSamplingFromProbKernel", "top_k_arr"),
        "min_p_sampling_from_probs": ("MinPSamplingFromProbKernel", "min_p_arr"),
        "top_p_sampling_from_probs": ("TopPSamplingFromProbKernel", "top_p_arr"),
        "top_k_top_p_sampling_from_probs": ("TopKTopPSamplingFromProbKernel", "top_k_arr"),
    }
    for name, (function, array) in read.items():
        row, body = row_of(name, release), kernel(text, function)
        by_output = any(rule.argument == f"maybe_{array}" for rule in row.rules)
        assert (f"{array}[bx]" in body) == by_output
        assert (f"{array}[row_idx]" in body) != by_output
        if array == "top_k_arr":
            assert "IdType* top_k_arr" in body
            assert next(arg for arg in row.tensors if arg.name == f"maybe_{array}").dtype == "I"


@pytest.mark.parametrize("release", RELEASES)
def test_softmax_in_slices(release, sources):
    text = sources(release, "include/flashinfer/sampling.cuh")
    constants = dict(re.findall(r"constexpr uint32_t ([A-Z_]+) = (\d+);", text))
    assert int(constants["SMALL_BATCH_THRESHOLD"]) == sampling._SHARED_ROWS
    assert int(constants["LARGE_VOCAB_THRESHOLD"]) == sampling._SHARED_FROM
    assert int(constants["DEFAULT_SLICE_SIZE"]) == sampling._SLICE
    assert "batch_size * num_slices * sizeof(PartialSoftmaxResult)" in text
    assert sampling._softmax_bytes({"n": 128, "h": 2**23}) == 2**20
    assert sampling._softmax_bytes({"n": 128, "h": 2**24}) == 2**21


WITH_WORKSPACE = [
    release for release in RELEASES
    if row_of("top_p_renorm_probs", release).tensors[-1].name == "workspace"
]  # fmt: skip


@pytest.mark.parametrize("release", WITH_WORKSPACE)
def test_the_workspace_of_top_p_renorm(release, sources):
    """As FlashInfer's Python function makes it."""
    row = row_of("top_p_renorm_probs", release)
    text = sources(release, "include/flashinfer/air_top_p.cuh")
    assert "BITS_PER_PASS = 11;" in text and renorm._BUCKETS == 2**11
    assert "dim3 grid(blockNum, batch_size);" in text and row.limits("<=")["n"] == (2**16 - 1,)
    assert "probs[batchId * vocabSize + i]" in text and row.offset_limit == 2**31
    python = sources(release, "sampling.py")
    body = re.search(r"align256 = lambda.*?ws_size = \(.*?\n    \)\n", python, re.DOTALL)
    for n, h in ((1, 2048), (3, 32000), (100, 128256)):
        known = {"batch_size": n, "vocab_size": h, "is_deterministic": True}
        exec(re.sub(r"^    ", "", body[0], flags=re.MULTILINE), known)
        assert renorm.top_p_renorm_workspace_size(n, h) == known["ws_size"]


@pytest.mark.parametrize("release", RELEASES)
def test_rows_that_blocks_share(release, sources):
    """What a group of blocks has of the scratch, and what a block may choose of its own row."""
    text = sources(release, "include/flashinfer/topk.cuh")
    state = re.search(r"struct RadixRowState \{(.*?)\};", text, re.DOTALL)[1]
    fields = re.findall(r"^  (.*?)(?: \w+(?:\[\d+\])*);", state, re.MULTILINE)
    assert "histogram[3][256];" in state and fields[0] == "uint32_t"
    assert {*fields} <= {"uint32_t", "int", "float", "unsigned long long"}
    group = 4 * 3 * 256 + 8 * len(fields)
    assert renorm.ROW_STATES.alignment % (8 if "unsigned long long" in fields else 4) == 0
    found = re.search(r"MAX_DETERMINISTIC_CTAS_PER_GROUP = (\d+);", text)
    group += 2 * 4 * int(found[1]) if found else 0
    # Half as many groups as multiprocessors: enough for 400 of these.
    assert renorm.ROW_STATES.bytes >= 200 * group
    assert re.search(rf"FILTERED_TOPK_MAX_K = {topk.MOST_CHOSEN};", text)
    assert "std::min(static_cast<uint32_t>(num_sms) / ctas_per_group" in text
