"""Kernels that have no row: all-to-all and all-reduce.

Two ranks are two streams of one GPU here: their kernels wait for each other and are small
enough to run at once.
"""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers.untyped_calls import (
    BF16,
    HALF,
    call,
    exchanged,
    float64,
    judged,
    module,
    poisoned,
)

SMS = 16  # what the all-to-all may use: 4 channels


@pytest.fixture
def comm():
    """The module, told how many SMs it may use; it takes that once, before it counts them."""
    found = module("comm")
    try:
        found.set_moe_max_usable_sm_count(SMS, device="cuda:0")
    except fi_ffi.KernelError as error:
        assert "before it is used" in str(error)
    return found


def test_all_to_all_workspaces(comm):
    for ranks in (1, 2, 8, 16):
        channels = max(SMS // 2 // (2 * -(-ranks // 8)), 1)
        size = comm.get_moe_commworkspace_size_per_rank(ranks, device="cuda:0")
        assert size == ranks * channels * (8 * 256 * 1024 + 256)
        assert comm.get_moe_prepare_workspace_size_per_rank(ranks) == ranks * ((1 << 20) + 256)
    with pytest.raises(fi_ffi.KernelError, match="before it is used"):
        comm.set_moe_max_usable_sm_count(SMS, device="cuda:0")


@pytest.mark.parametrize(("ranks", "top_k"), [(1, 1), (4, 2), (8, 6)])
@pytest.mark.parametrize("counted", [False, True])
def test_moe_comm_prepare_indices_and_local_gather(
    ranks, top_k, counted, comm, rng, to_gpu, stream
):
    room, experts = 37, 64
    counts = rng.integers(0, room + 1, ranks) if counted else np.full(ranks, room)
    starts = np.concatenate([[0], np.cumsum(counts)])
    total = max(int(starts[-1]), 1)
    targets = rng.integers(0, ranks, (total, top_k)).astype(np.int32)
    ids = rng.integers(0, experts, (total, top_k)).astype(np.int32)
    scales = rng.standard_normal((total, top_k)).astype(np.float32)
    given = [to_gpu(array) for array in (targets, ids, scales)]
    ends = to_gpu(starts[1:].astype(np.int32)) if counted else None
    for rank in range(ranks):
        expected = exchanged(targets, starts, rank, ranks, room)
        outs = [to_gpu(poisoned(array.shape, np.int32) - 5) for array in expected.values()]
        numbers = (room, experts, top_k, rank, ranks)
        call(comm.moe_comm_prepare_indices, given[0], ends, *outs, *numbers, stream=stream)
        for out, (name, array) in zip(outs, expected.items(), strict=True):
            assert (out.get() == array).all(), name
            assert out.intact()
        local = [to_gpu(poisoned((room * ranks, top_k), of)) for of in (np.int32, np.float32)]
        call(comm.moe_local_gather, outs[3], outs[0], *given[1:], *local, *numbers, stream=stream)
        mine = expected["localGatherIndices"]
        there = (mine >= 0)[:, None]
        assert (local[0].get() == np.where(there, ids[mine], experts)).all()
        assert (local[1].get() == np.where(there, scales[mine], 0)).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_moe_comm(ranks, comm, rng, to_gpu, streams):
    hidden, tokens = 2048, 100
    size = comm.get_moe_commworkspace_size_per_rank(ranks, device="cuda:0")
    workspaces = to_gpu(np.zeros((ranks, size // 8), np.uint64))
    x = [rng.standard_normal((tokens, hidden)).astype(BF16) for _ in range(ranks)]
    sent = [[rng.permutation(tokens)[: rng.integers(tokens)] for _ in x] for _ in x]
    prepared, outs = [], []
    for rank in range(ranks):
        coming = [sent[peer][rank] for peer in range(ranks)]
        total = sum(map(len, coming))
        where = rng.permutation(total + 2)[:total]
        outs.append((to_gpu(poisoned((total + 2, hidden), BF16)), coming, where))
        arrays = [np.cumsum([len(a) for a in sent[rank]]), np.concatenate(sent[rank]),
                  np.cumsum([len(a) for a in coming]), where]  # fmt: skip
        prepared.append(
            [to_gpu(np.append(a, -1)[: max(len(a), 1)].astype(np.int32)) for a in arrays]
        )
    inputs = [to_gpu(array) for array in x]
    for rank, (send_ends, send, recv_ends, recv) in enumerate(prepared):
        call(comm.moe_comm, inputs[rank], send_ends, send, outs[rank][0], recv_ends, recv,
             workspaces, rank, ranks, stream=streams[rank])  # fmt: skip
    for out, coming, where in outs:
        expected = np.concatenate([x[peer][rows] for peer, rows in enumerate(coming)])
        got = out.get()
        assert (float64(got[where]) == float64(expected)).all()
        others = np.setdiff1d(np.arange(len(got)), where)
        assert np.isnan(float64(got[others])).all() and out.intact()


def test_moe_prepare(comm, rng, to_gpu, stream):
    """One rank sends itself everything, in an order of its own."""
    room, tokens, experts, top_k = 64, 50, 32, 4
    size = comm.get_moe_prepare_workspace_size_per_rank(1)
    ids = rng.integers(0, experts, (tokens, top_k)).astype(np.int32)
    scales = rng.standard_normal((tokens, top_k)).astype(np.float32)
    counts = rng.integers(0, 1000, experts).astype(np.int32)
    outs = [to_gpu(poisoned((room, top_k), np.int32))]
    outs += [to_gpu(poisoned((n,), np.int32)) for n in (1, 1, room, room, *[room * top_k] * 4)]
    local = to_gpu(poisoned((room, top_k), np.float32))
    gathered = to_gpu(poisoned((1, experts), np.int32))
    call(comm.moe_prepare, *map(to_gpu, (ids, scales, counts)),
         to_gpu(np.zeros((1, size // 8), np.uint64)), *outs, local, gathered, room, 0, 1, experts,
         experts, top_k, stream=stream)  # fmt: skip
    prepared, sends, recvs, recv, _, back, _, send, _ = (out.get() for out in outs)
    assert sends == recvs == tokens
    order = send[:tokens]
    assert (np.sort(order) == np.arange(tokens)).all()
    assert (back[:tokens] == order * top_k).all()
    assert (recv[:tokens] == np.arange(tokens)).all()
    assert (prepared[:tokens] == ids[order]).all()
    assert (local.get()[:tokens] == scales[order]).all()
    assert (gathered.get()[0] == counts).all()
    assert all(out.intact() for out in (*outs, local, gathered))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_vllm_all_reduce(dtype, rng, to_gpu, streams):
    found, n = module("vllm_comm"), 8192
    size = found.meta_size()
    assert size == 3 * 36 * 8 * 4  # counters of 36 blocks for 8 ranks, and two sets of peers'
    signals = [to_gpu(np.zeros(size + n * 4, np.uint8)) for _ in streams]
    buffers = [to_gpu(poisoned((n,), dtype)) for _ in streams]
    tables = [to_gpu(np.zeros(4096, np.uint8)) for _ in streams]
    ranks = [
        found.init_custom_ar(
            [s.ptr for s in signals], table.desc(), rank, True, stream=streams[rank]
        )
        for rank, table in enumerate(tables)
    ]
    for rank in ranks:
        found.register_buffer(rank, [b.ptr for b in buffers], device="cuda:0")
    for _ in range(3):
        x = [rng.standard_normal(n).astype(dtype) for _ in streams]
        inputs, outs = [to_gpu(a) for a in x], [to_gpu(poisoned((n,), dtype)) for _ in x]
        for i, rank in enumerate(ranks):
            call(found.all_reduce, rank, inputs[i], outs[i], buffers[i].ptr, buffers[i].nbytes, 4,
                 stream=streams[i])  # fmt: skip
        expected = float64(x[0]) + float64(x[1])
        for out in outs:
            judged(out, expected, HALF[np.dtype(dtype)] * 1.001 * np.abs(expected) + 1e-6)
    with pytest.raises(fi_ffi.KernelError, match="is not registered"):
        call(found.all_reduce, ranks[0], inputs[0], outs[0], 0, 0, 4, stream=streams[0])
    for rank in ranks:
        # No graph was captured, so there is nothing to share.
        handles, offsets = found.get_graph_buffer_ipc_meta(rank)
        assert len(handles) == len(offsets) == 0
        found.register_graph_buffers(rank, [[], []], [[], []], device="cuda:0")
        found.dispose(rank)
    with pytest.raises(fi_ffi.KernelError, match="Odd num gpus"):
        found.init_custom_ar([signals[0].ptr], tables[0].desc(), 0, True, stream=streams[0])
