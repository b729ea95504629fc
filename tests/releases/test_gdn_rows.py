"""What the rows of the gated delta rule take from the kernel's sources."""

from __future__ import annotations

import pytest

from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits

from tests.releases.bindings import parameters

OP = OPS["gdn_prefill"]
RELEASES = ["0.6.3", "0.6.7", "0.6.8", "0.6.12", the_lock().default_release]
FLAT = "include/flashinfer/flat/hopper"
DELTA = f"{FLAT}/collective/flat_collective_tma_warpspecialized_delta_rule.hpp"


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("release", RELEASES)
def test_arguments_are_the_launchers(release, sources):
    (row,) = [row for row in OP.rows if fits(row, release)]
    declared = parameters(sources(release, row.source))[row.symbol]
    assert [arg.name for arg in row.args] == declared


@pytest.mark.parametrize("release", RELEASES)
def test_sizes_and_limits_are_the_kernels(release, sources):
    (row,) = [row for row in OP.rows if fits(row, release)]
    kernel = words(
        sources(release, "include/flashinfer/flat/prefill/prefill_kernel_delta_rule_sm90.cuh")
    )
    assert "using TileShape = Shape<_64, _64, _128>;" in kernel
    assert row.limits("in") == {"head_size": (128,)}
    delta = words(sources(release, DELTA))
    # States are laid out for the head size that was compiled, in integers of 32 bits.
    layout = "make_layout(make_shape(Int<HeadSizeQK>{}, Int<HeadSizeV>{}, num_state_heads,"
    assert delta.count(layout) == 2 and "int num_state_heads = problem_size" in delta
    states = [arg for arg in row.tensors if arg.name in ("input_state", "output_state")]
    assert [arg.offset_limit for arg in states] == [2**31] * 2
    # The first tile is waited for, whether or not there is one.
    body = delta[delta.index("kv_load(tKVrKV);") :]
    assert body.startswith("kv_load(tKVrKV); compute_loop_body(0,")
    assert "total_seq_len >= num_seqs" in row.requires
    # A descriptor for each multiprocessor.
    store = words(sources(release, f"{FLAT}/collective/flat_collective_store.hpp"))
    assert "sizeof(cute::TmaDescriptor) * sm_count" in store
    # A CUtensorMap is of 16 numbers of 64 bits.
    assert [arg.bytes_per_multiprocessor for arg in row.tensors if "workspace" in arg.name] == [128]


@pytest.mark.parametrize("release", RELEASES)
def test_checkpoints_are_kept_as_the_helper_counts(release, sources):
    (row,) = [row for row in OP.rows if fits(row, release)]
    delta = words(sources(release, DELTA))
    assert bool(row.together) == ("checkpoint_every_n_tokens" in delta)
    if row.together:
        # Neither the first tile nor the last has to be full.
        assert "if (ckpt_blk_interval == 1) { kv_checkpoint_store(ckpt_count++);" in delta
        assert (
            "if (num_blocks % ckpt_blk_interval == 0) { kv_checkpoint_store(ckpt_count);" in delta
        )
        assert "num_blocks = ceil_div(work_desc.seq_len, get<0>(TileShape{}));" in delta
