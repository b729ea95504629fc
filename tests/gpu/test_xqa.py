"""`xqa` on a GPU against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi

from tests.helpers.xqa_calls import BF16, F16, FP8, Batch, Spec

PLAIN = Spec(q=BF16, kv=BF16, page_size=16, group=4)
IN_FP8 = Spec(q=F16, kv=FP8, page_size=64, group=8, window=200, lengths=(1, 64, 199, 200, 3000))
SPECS = {
    "plain": PLAIN,
    "one request": replace(PLAIN, lengths=(5,)),
    "one head": replace(PLAIN, kv_heads=1),
    "split": replace(PLAIN, lengths=(8000, 1), kv_heads=1),
    "many": replace(PLAIN, lengths=tuple(range(1, 200)), kv_heads=3),
    "HND": replace(PLAIN, layout="HND"),
    "q_scale": replace(PLAIN, options={"q_scale": 0.25}),
    "q_scale tensor": replace(PLAIN, options={"q_scale": np.array([0.25], np.float32)}),
    "sinks": replace(PLAIN, options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    "sinks, split": replace(PLAIN, lengths=(8000,), options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    # Four drafted queries: what is causal, and trees; alone in a tile, and over its end.
    "drafts": replace(PLAIN, queries=4, lengths=(4, 16, 17, 300)),
    "drafts, tree": replace(PLAIN, queries=4, tree=True, lengths=(4, 5, 66, 257, 258, 259)),
    "drafts, split": replace(PLAIN, queries=4, tree=True, lengths=(8000, 4), kv_heads=1),
    "drafts, many": replace(PLAIN, queries=4, tree=True, lengths=tuple(range(4, 200)), kv_heads=3),
    "drafts, HND": replace(PLAIN, queries=4, tree=True, layout="HND", lengths=(4, 300)),
    "drafts, q_scale": replace(PLAIN, queries=4, lengths=(70,), options={
        "q_scale": np.array([0.25], np.float32)}),
    "drafts, sinks": replace(PLAIN, queries=4, lengths=(70, 3000), options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    # More rows than a block has: another module, which takes any number.
    "many drafts": replace(PLAIN, queries=40, tree=True, lengths=(40, 41, 300, 5000)),
    "fp8, drafts": replace(IN_FP8, window=0, queries=4, tree=True, lengths=(4, 64, 3000)),
    "fp8 outputs": replace(IN_FP8, out=FP8, options={"rcp_out_scale": 20.0}),
    "fp8 outputs, one request": replace(IN_FP8, out=FP8, lengths=(5,)),
    "fp8 outputs, split": replace(IN_FP8, out=FP8, lengths=(8000, 1), kv_heads=1, window=7000,
                                  options={"rcp_out_scale": 0.5, "kv_scale": 1.5}),
    "fp8 outputs, many": replace(IN_FP8, out=FP8, lengths=tuple(range(1, 200)), kv_heads=3),
    "fp8 outputs of drafts": replace(IN_FP8, out=FP8, window=0, queries=4, tree=True,
                                     lengths=(4, 64, 3000), options={"rcp_out_scale": 8.0}),
    "fp8, window": IN_FP8,
    "fp8, HND": replace(IN_FP8, layout="HND"),
    "fp8, scales": replace(IN_FP8, options={"q_scale": 0.5, "kv_scale": 1.5}),
    "fp8, scale tensors": replace(IN_FP8, options={
        "q_scale": np.array([0.5], np.float32), "kv_scale": np.array([1.5], np.float32)}),
}  # fmt: skip


def run(spec, rng, to_gpu, stream) -> float:
    try:
        return Batch(spec, rng).check(to_gpu, stream)
    except fi_ffi.KernelNotFoundError as error:
        pytest.skip(f"{error}".splitlines()[0])


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng, to_gpu, stream, record_property):
    worst = max(run(SPECS[name], rng, to_gpu, stream) for _ in range(2))
    record_property("error_of_bound", worst)
    assert worst <= 1


def test_calls_one_after_another_share_semaphores(rng, to_gpu, stream):
    """Those of different shapes, on one stream: each leaves them zero for the next."""
    for _ in range(3):
        for name in ("split", "plain", "many", "split"):
            assert run(SPECS[name], rng, to_gpu, stream) <= 1


@pytest.mark.parametrize("sm_count", [None, 1, 7, 10**6])
@pytest.mark.parametrize("name", ["split", "plain", "many", "fp8, window"])
def test_scratch_of_the_callers(name, sm_count, rng, to_gpu, stream):
    """A counter for each request and head of the keys: none beside them is counted up."""
    from fi_ffi.loader import machine
    from fi_ffi.ops.attention.rows import SCRATCH_BYTES

    spec = SPECS[name]
    size = SCRATCH_BYTES * machine.multiprocessors(0)
    options = {
        "workspace_buffer": np.zeros(size, np.uint8),
        "semaphores": np.zeros(len(spec.lengths) * spec.kv_heads, np.uint32),
        "sm_count": sm_count,
    }
    for _ in range(2):
        assert run(replace(spec, options=options), rng, to_gpu, stream) <= 1
