"""POD, xqa, block-sparse attention and cascades on a GPU against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check
from fi_ffi.loader import machine
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.plans.rows import SCRATCH_BYTES
from fi_ffi.ops.plans.xqa import WINDOWS_OF_EACH

from tests.attention.test_xqa_mla import SPECS as XQA_MLA
from tests.helpers import batch_pod_calls, pod_calls, xqa_calls, xqa_mla_calls
from tests.helpers.prepared_calls import or_skip
from tests.helpers.sparse_calls import SPECS as SPARSE
from tests.helpers.sparse_calls import Cascade, Sparse, Variable
from tests.helpers.xqa_calls import BF16, F16, FP8

POD = pod_calls.SPECS | {
    "split prefill": pod_calls.Spec(qo_len=3, kv_len=5000),
    "split decode": pod_calls.Spec(lengths=(9000, 3)),
    "long prefill": pod_calls.Spec(
        qo_len=600, kv_len=700, causal=True, lengths=tuple(range(1, 60))
    ),
    "many": pod_calls.Spec(lengths=tuple(range(1, 300)), group=1, kv_heads=4),
    "group of 16": pod_calls.Spec(group=16, kv_heads=1),
}
BATCH_POD = batch_pod_calls.SPECS | {
    "split prefill": batch_pod_calls.Spec(prefills=((3, 5000),)),
    "split decode": batch_pod_calls.Spec(lengths=(9000, 3)),
    "long prefills": batch_pod_calls.Spec(prefills=((600, 700), (1, 900), (300, 300)), causal=True,
                          lengths=tuple(range(1, 60))),
    "many": batch_pod_calls.Spec(lengths=tuple(range(1, 300)), group=1, kv_heads=4,
                 prefills=tuple((n, 2 * n) for n in range(1, 40))),
    "group of 16": batch_pod_calls.Spec(group=16, kv_heads=1),
    "scale": batch_pod_calls.Spec(scale=0.3),
}  # fmt: skip
LONG = {
    "long blocks": Sparse(M=2000, N=8192, R=64, C=64, heads=2, kv_heads=1, density=0.2),
    "long blocks fa2, masks": Sparse(M=700, N=4096, R=64, C=16, heads=2, mask=True),
    "long variable": Variable(rows=9, columns=40, qo_len=900, kv_len=6000, group=1),
    "long levels": replace(Cascade(), most_keys=5000, heads=2, kv_heads=1),
    "many requests": Cascade(shares=(64, 16, 1), queries=(1,) * 64, most_keys=900, causal=False),
}
_PLAIN = xqa_calls.Spec(q=BF16, kv=BF16, page_size=16, group=4)
_IN_FP8 = xqa_calls.Spec(
    q=F16, kv=FP8, page_size=64, group=8, window=200, lengths=(1, 64, 199, 200, 3000)
)
XQA = {
    "plain": _PLAIN,
    "one request": replace(_PLAIN, lengths=(5,)),
    "one head": replace(_PLAIN, kv_heads=1),
    "split": replace(_PLAIN, lengths=(8000, 1), kv_heads=1),
    "many": replace(_PLAIN, lengths=tuple(range(1, 200)), kv_heads=3),
    "HND": replace(_PLAIN, layout="HND"),
    "q_scale": replace(_PLAIN, options={"q_scale": 0.25}),
    "q_scale tensor": replace(_PLAIN, options={"q_scale": np.array([0.25], np.float32)}),
    "sinks": replace(_PLAIN, options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    "sinks, split": replace(_PLAIN, lengths=(8000,), options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    # Four drafted queries: what is causal, and trees; alone in a tile, and over its end.
    "drafts": replace(_PLAIN, queries=4, lengths=(4, 16, 17, 300)),
    "drafts, tree": replace(_PLAIN, queries=4, tree=True, lengths=(4, 5, 66, 257, 258, 259)),
    "drafts, split": replace(_PLAIN, queries=4, tree=True, lengths=(8000, 4), kv_heads=1),
    "drafts, many": replace(_PLAIN, queries=4, tree=True, lengths=tuple(range(4, 200)), kv_heads=3),
    "drafts, HND": replace(_PLAIN, queries=4, tree=True, layout="HND", lengths=(4, 300)),
    "drafts, q_scale": replace(_PLAIN, queries=4, lengths=(70,), options={
        "q_scale": np.array([0.25], np.float32)}),
    "drafts, sinks": replace(_PLAIN, queries=4, lengths=(70, 3000), options={
        "sinks": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}),
    "lengths of int32": replace(_PLAIN, of_lengths=np.int32),
    "drafts, lengths of int32": replace(
        _PLAIN, queries=4, lengths=(4, 16, 17, 300), of_lengths=np.int32),
    "drafts, a window of all": replace(
        _PLAIN, queries=4, tree=True, lengths=(4, 17, 300), window=320),
    # Of FlashInfer 0.6.16 and later: a window of each query's own.
    "drafts, a window": replace(_PLAIN, queries=4, window=20, lengths=(4, 17, 23, 24, 300, 3000)),
    "drafts, a longer window": replace(
        _PLAIN, queries=4, window=257, lengths=(256, 257, 260, 261, 3000), kv_heads=1),
    "drafts, a window of one": replace(
        _PLAIN, queries=4, window=1, tree=True, lengths=tuple(range(4, 80))),
    # More rows than a block has: another module, which takes any number.
    "many drafts": replace(_PLAIN, queries=40, tree=True, lengths=(40, 41, 300, 5000)),
    "fp8, drafts": replace(_IN_FP8, window=0, queries=4, tree=True, lengths=(4, 64, 3000)),
    "fp8 outputs": replace(_IN_FP8, out=FP8, options={"rcp_out_scale": 20.0}),
    "fp8 outputs, one request": replace(_IN_FP8, out=FP8, lengths=(5,)),
    "fp8 outputs, split": replace(_IN_FP8, out=FP8, lengths=(8000, 1), kv_heads=1, window=7000,
                                  options={"rcp_out_scale": 0.5, "kv_scale": 1.5}),
    "fp8 outputs, many": replace(_IN_FP8, out=FP8, lengths=tuple(range(1, 200)), kv_heads=3),
    "fp8 outputs of drafts": replace(_IN_FP8, out=FP8, window=0, queries=4, tree=True,
                                     lengths=(4, 64, 3000), options={"rcp_out_scale": 8.0}),
    "fp8, window": _IN_FP8,
    "fp8, HND": replace(_IN_FP8, layout="HND"),
    "fp8, scales": replace(_IN_FP8, options={"q_scale": 0.5, "kv_scale": 1.5}),
    "fp8, scale tensors": replace(_IN_FP8, options={
        "q_scale": np.array([0.5], np.float32), "kv_scale": np.array([1.5], np.float32)}),
}  # fmt: skip


@pytest.fixture
def waiting_stream():
    """A stream that waits for the default one, as POD needs it."""
    made = check(runtime.cudaStreamCreate())
    yield int(made)
    check(runtime.cudaStreamSynchronize(made))
    check(runtime.cudaStreamDestroy(made))


def pod(spec, rng, to_gpu, stream) -> float:
    batch = pod_calls.Batch(spec, rng)
    heads = spec.kv_heads * spec.group, spec.kv_heads
    tmp = fi_ffi.single_prefill_workspace_size(spec.qo_len, spec.kv_len, *heads, spec.head_dim)
    return batch.run(batch.plan(stream=stream), to_gpu, stream, tmp)


def batch_pod(spec, rng, to_gpu, stream) -> float:
    """A plan, and the same after a replan."""
    first, other = (batch_pod_calls.Batch(spec, rng) for _ in range(2))
    plan = first.plan(stream=stream)
    worst = first.run(plan, to_gpu, stream)
    plan.replan(*other.planned(), stream=stream)
    return max(worst, other.run(plan, to_gpu, stream))


def xqa(spec, rng, to_gpu, stream) -> float:
    hides = spec.queries > 1 and 0 < spec.window < max(spec.lengths)
    if hides and not is_in(release_in_force(), WINDOWS_OF_EACH):
        pytest.skip(f"FlashInfer {release_in_force()} has no window of each query's own")
    return xqa_calls.Batch(spec, rng).check(to_gpu, stream)


def xqa_mla(spec, rng, to_gpu, stream) -> float:
    """Of SM120, which it was never run on."""
    try:
        return xqa_mla_calls.Batch(spec, rng).check(to_gpu, stream)
    except fi_ffi.ArchitectureError as error:
        pytest.skip(str(error).partition("\n")[0])


def sparse(spec, rng, to_gpu, stream) -> float:
    return spec.check(rng, to_gpu, "cuda:0", stream)


CALLS = [(pod, POD, 2), (batch_pod, BATCH_POD, 2), (xqa, XQA, 2), (xqa_mla, XQA_MLA, 2),
         (sparse, SPARSE | LONG, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "spec", "times"),
    [
        pytest.param(call, spec, times, id=f"{call.__name__} {name}")
        for call, specs, times in CALLS
        for name, spec in specs.items()
    ],
)
def test_against_float64(call, spec, times, rng, to_gpu, waiting_stream, stream, record_property):
    stream = waiting_stream if call is pod else stream
    worst = max(or_skip(call, spec, rng, to_gpu, stream) for _ in range(times))
    record_property("error_of_bound", worst)
    assert worst <= 1


def test_many_runs_of_pod_on_the_default_stream(rng, to_gpu):
    for _ in range(20):
        assert or_skip(pod, replace(POD["plain"], lse=False), rng, to_gpu, 0) <= 1


def test_streams_that_do_not_wait_are_refused_by_pod(rng, to_gpu, stream, waiting_stream):
    or_skip(pod, POD["plain"], rng, to_gpu, waiting_stream)
    batch = pod_calls.Batch(POD["plain"], rng)
    arrays = {name: to_gpu(array) for name, array in batch.arrays(1 << 24).items()}
    plan = batch.plan(stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match="cudaStreamNonBlocking"):
        plan.run(**{name: array.desc() for name, array in arrays.items()}, stream=stream)
    given = {name: array.desc() for name, array in arrays.items()}
    call = fi_ffi.prepare(plan.run, **given, stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match="cudaStreamNonBlocking"):
        call()
    assert np.isnan(arrays["o_p"].get()).all()


def test_calls_of_xqa_share_semaphores(rng, to_gpu, stream):
    """Those of different shapes, on one stream: each leaves them zero for the next."""
    for _ in range(3):
        for name in ("split", "plain", "many", "split"):
            assert or_skip(xqa, XQA[name], rng, to_gpu, stream) <= 1


@pytest.mark.parametrize("sm_count", [None, 1, 7, 10**6])
@pytest.mark.parametrize("name", ["split", "plain", "many", "fp8, window"])
def test_scratch_of_the_callers_of_xqa(name, sm_count, rng, to_gpu, stream):
    """A counter for each request and head of the keys: none beside them is counted up."""
    spec = XQA[name]
    size = SCRATCH_BYTES * machine.multiprocessors(0)
    options = {
        "workspace_buffer": np.zeros(size, np.uint8),
        "semaphores": np.zeros(len(spec.lengths) * spec.kv_heads, np.uint32),
        "sm_count": sm_count,
    }
    for _ in range(2):
        assert or_skip(xqa, replace(spec, options=options), rng, to_gpu, stream) <= 1
