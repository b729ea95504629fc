"""`trtllm_comm`'s kernels: two ranks are two streams of one GPU, whose kernels wait for each other
and are small enough to run at once."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.comm.entries import OPS, setup
from fi_ffi.loader import machine, search
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.releases import FIRST
from fi_ffi.ops.table.comm import PATTERNS

from tests.helpers.fusion_calls import Call, MoeCall, Sizes

CALLS = [code for kind, codes in PATTERNS.items() for code in codes if kind != "_fp4"]


def judged(calls, sizes, to_gpu, streams):
    """Calls one after another over one workspace, each judged on every rank."""
    if not is_in(search.release() or FIRST, ">=0.6.12"):
        pytest.skip("before FlashInfer 0.6.12 these kernels add nothing to the norm's scales")
    memory = [to_gpu(sizes.contents()) for _ in streams]
    addresses = [each.ptr for each in memory]
    pointers = [to_gpu(sizes.pointers(addresses, rank)) for rank in range(sizes.ranks)]
    for call in calls:
        workspace = "workspace" if "finalize" in call.op else "workspace_ptrs"
        found = []
        for rank in range(sizes.ranks):
            inputs = {name: to_gpu(of) for name, of in call.inputs(rank).items()}
            outs = {name: to_gpu(of) for name, of in call.outputs().items()}
            if call.in_place:
                outs[call.same[0]] = inputs[call.same[1]]
            found.append((inputs, outs))
        for rank, (inputs, outs) in enumerate(found):
            given = {name: of.desc() for name, of in (inputs | outs).items()}
            OPS[call.op](
                world_size=sizes.ranks, world_rank=rank, stream=streams[rank],
                **given, **call.numbers(), **{workspace: pointers[rank].desc()},
            )  # fmt: skip
        results = [{name: of.get() for name, of in outs.items()} for _, outs in found]
        for (_, outs), result in zip(found, results, strict=True):
            call.judge(result, sizes.ranks)
            for name, of in outs.items():
                assert of.intact()
                assert (result[name].view(np.uint8) == results[0][name].view(np.uint8)).all(), name


def drawn(rng, sizes, pattern, count):
    calls = []
    for i in range(count):
        one_shot = i % 2 == 0
        tokens = int(rng.integers(1 if one_shot else sizes.ranks + 1, sizes.tokens + 1))
        hidden = int(rng.choice([hidden for hidden in (256, 512, 2880, 4096)
                                 if hidden <= sizes.hidden]))  # fmt: skip
        calls.append(Call(
            int(rng.integers(2**32)), pattern, tokens, hidden,
            0 if sizes.itemsize == 4 else int(rng.integers(1, 3)), one_shot, bool(rng.integers(2)),
            float(rng.integers(2)), 0, 64, i % 3 == 2,
        ))  # fmt: skip
    return calls


@pytest.mark.parametrize("pattern", CALLS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_patterns(pattern, itemsize, rng, to_gpu, streams):
    sizes = Sizes(2, 9, 4096, itemsize)
    judged(drawn(rng, sizes, pattern, 8), sizes, to_gpu, streams)


@pytest.mark.parametrize("finalize", [False, True])
@pytest.mark.parametrize("has_all", [False, True])
def test_experts(finalize, has_all, rng, to_gpu, streams):
    sizes = Sizes(2, 9, 4096)
    calls = [
        MoeCall(int(rng.integers(2**32)), finalize, int(rng.integers(1, 10)),
                int(rng.choice([256, 2048, 4096])), int(rng.integers(1, 3)), 3, 2, has_all,
                float(rng.integers(2)))
        for _ in range(6)
    ]  # fmt: skip
    judged(calls, sizes, to_gpu, streams)


def test_lamport_buffers_are_begun_by_their_own_functions(to_gpu, stream):
    for dtype, empty in (("float16", 0x8000), ("bfloat16", 0x8000), ("float32", 0x80000000)):
        item = np.dtype(f"u{4 if dtype == 'float32' else 2}")
        buffer, step = to_gpu(np.zeros((5, 16), item)), 16 * item.itemsize
        with fi_ffi.stream(stream):
            setup("trtllm_lamport_initialize")(buffer.ptr + 3 * step, 16, dtype, device="cuda:0")
            setup("trtllm_lamport_initialize_all")(
                *(buffer.ptr + i * step for i in (0, 1, 4)), step, dtype, device="cuda:0"
            )
        found = buffer.get()
        assert (found[[0, 1, 3, 4]] == empty).all()
        assert not found[2].any()
        assert buffer.intact()


def test_what_the_gpu_or_the_release_cannot_is_refused(rng, to_gpu, streams):
    """Before anything is launched: no rank waits for another afterwards."""
    sizes = Sizes(2, 9, 4096)
    if machine.capability(0)[0] == 9:
        with pytest.raises(fi_ffi.ArchitectureError, match="zeros for FP4"):
            judged([Call(0, 3, 4, 256, 1)], sizes, to_gpu, streams)
    small = Call(0, 1, 4, 64, 1)
    if is_in(search.release() or FIRST, "<0.6.15"):
        with pytest.raises(fi_ffi.ArgumentError, match="16 for each thread of a warp"):
            judged([small], sizes, to_gpu, streams)
    else:
        judged([small], sizes, to_gpu, streams)
    judged(drawn(rng, sizes, 1, 2), sizes, to_gpu, streams)
