"""Groups on the CPU, of threads and of processes, against sums in float64."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fi_ffi import comm
from fi_ffi.comm import fusion
from fi_ffi.errors import ArgumentError, KernelNotFoundError

from tests.helpers import rank_programs, ranks
from tests.helpers.rank_programs import Calls

pytestmark = pytest.mark.usefixtures("other_threads")

MOST = 1 << 20
MAKE = {"threads": comm.threads, "processes": comm.processes}
OPS = ("all_reduce", "all_reduce", "all_gather", "reduce_scatter")


def on_all(kind, size, body, *args):
    """What a body gives on each rank; raises what a rank raises."""
    found = ranks.run(kind, size, body, MAKE[kind](size), 0, *args)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def drawn(rng: np.random.Generator, size: int, count: int, algorithms) -> Calls:
    """Sizes from 2 bytes to twice what the ranks' memory holds, of every op and dtype."""
    made: Calls = []
    for i in range(count):
        op, algorithm = OPS[i % 4], algorithms[i % len(algorithms)]
        n = int(2 ** rng.uniform(0, 19 if algorithm == "auto" else 15))
        if op == "reduce_scatter":
            n = max(n // size, 1) * size
        if algorithm == "twoshot":
            n = 1 << int(rng.integers(11, 15))
        # What is as large as the workspace's dtype; three of them for the others.
        kind = int(rng.integers(1, 3) if "shot" in algorithm else rng.integers(3))
        made.append((op, n, kind, bool(rng.integers(2)), algorithm))
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", MAKE)
def test_calls(kind, size, rng):
    seed = int(rng.integers(2**32))
    algorithms = ("auto", "auto", "vllm", "oneshot", "nccl", "twoshot", "oneshot")
    options = {"max_bytes": MOST, "check": True, "fusion": comm.FusionSize(64, 1024)}
    if size in (1, 3):
        algorithms, options["fusion"] = ("auto",), None
    made = drawn(rng, size, 28, algorithms)
    found = on_all(kind, size, rank_programs.calls, options, seed, made)
    for number, (op, n, of, *_) in enumerate(made):
        rank_programs.check(op, seed, number, n, of, [results[number] for results in found])


@pytest.mark.parametrize("kind", MAKE)
def test_pieces_at_any_address(kind, rng):
    options = {"max_bytes": MOST}
    seed = int(rng.integers(2**32))
    assert on_all(kind, 2, rank_programs.many, options, seed, 200, 1 << 18, 1 << 18) == ["", ""]


@pytest.mark.parametrize("of", range(3), ids=[dtype.name for dtype in rank_programs.DTYPES])
@pytest.mark.parametrize(("kind", "size"), [("threads", 2), ("threads", 4), ("processes", 2)])
def test_fusion(kind, size, of, rng):
    seed, hidden = int(rng.integers(2**32)), 256
    made = [
        (name, tokens, hidden, of, oneshot)
        for name in rank_programs.OUTS
        for tokens in (1, 7, 64)
        for oneshot in (True, False)
        if oneshot or tokens > size
    ]
    dtype = rank_programs.DTYPES[of].name
    options = {"max_bytes": 1 << 12, "fusion": comm.FusionSize(64, hidden, dtype)}
    found = on_all(kind, size, rank_programs.fused, options, seed, made)
    for number, call in enumerate(made):
        rank_programs.check_fused(seed, number, call, [results[number] for results in found])


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (2, {}, ["oneshot", "oneshot", "oneshot", "vllm", "nccl", "vllm"]),
        (2, {"max_bytes": 1 << 12}, ["oneshot", "oneshot", "nccl", "nccl", "nccl", "vllm"]),
        (2, {"fusion": (64, 1024)}, ["oneshot", "oneshot", "vllm", "vllm", "nccl", "vllm"]),
        (4, {}, ["oneshot", "oneshot", "vllm", "nccl", "nccl", "vllm"]),
        (6, {}, ["vllm", "vllm", "vllm", "nccl", "nccl", "vllm"]),
    ],
)
def test_what_auto_is(size, options, expected):
    """By default, one shot wherever it is the quickest, of tensors of two bytes an element."""
    if "fusion" in options:
        options = {"fusion": comm.FusionSize(*options["fusion"])}

    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", **options) as group:
            found = [group.algorithm_for(n) for n in (2, 1 << 12, 1 << 21, 1 << 23, 1 << 30)]
            return [*found, group.algorithm_for(1 << 12, "float32")]

    assert on_all("threads", size, body) == [expected] * size


@pytest.mark.parametrize("lacks", ["trtllm_comm", "vllm_comm"])
def test_a_rank_whose_kernels_lack_a_module(lacks, monkeypatch):
    """No rank has its algorithms then, and all are told why not."""
    without = threading.local()
    monkeypatch.setattr(
        comm.group, "missing_kernels", lambda device: getattr(without, "modules", {})
    )
    algorithm = {"trtllm_comm": "oneshot", "vllm_comm": "vllm"}[lacks]

    def body(rank, given, gpus):
        without.modules = {lacks: "not built"} if rank else {}
        x = np.full((1, 64), rank + 1, np.float16)
        with comm.Group(given[rank], device="cpu", timeout_s=10) as group:
            with pytest.raises(ArgumentError, match=f"what this group has|without {lacks}"):
                group.all_reduce(x, algorithm=algorithm)
            if lacks == "trtllm_comm":
                with pytest.raises(ArgumentError, match="without trtllm_comm"):
                    group.allreduce_fusion(x, pattern="kAllReduce")
            else:
                with pytest.raises(ArgumentError, match="rank 1 without vllm_comm: not built"):
                    group.all_reduce(x, algorithm=algorithm)
            group.all_reduce(x)
            assert (x == 3).all()
            return group.algorithm_for(1 << 12)

    other = {"trtllm_comm": "vllm", "vllm_comm": "oneshot"}[lacks]
    assert on_all("threads", 2, body) == [other] * 2


def test_a_fusion_that_a_rank_has_no_kernels_for(monkeypatch):
    """Every rank is told at once, and of which rank."""
    without = threading.local()
    monkeypatch.setattr(comm.group, "missing_kernels", lambda device: without.modules)

    def body(rank, given, gpus):
        without.modules = {"trtllm_comm": "not built"} if rank else {}
        with pytest.raises(
            ArgumentError, match="`fusion`: .* rank 1 without trtllm_comm: not built"
        ):
            comm.Group(given[rank], device="cpu", fusion=comm.FusionSize(8, 64), timeout_s=30)
        return time.monotonic()

    begun = time.monotonic()
    assert max(on_all("threads", 2, body)) - begun < 15


def test_ranks_that_lack_all_kernels(monkeypatch):
    """They are told how to get them; where no kernels would help, what does."""
    lacks = {"vllm_comm": "build it", "trtllm_comm": "build this"}
    monkeypatch.setattr(comm.group, "missing_kernels", lambda device: lacks)

    def body(rank, given, gpus):
        words = "rank 0 without vllm_comm: build it; rank 0 without trtllm_comm: build this"
        if len(given) == 2:
            with pytest.raises(KernelNotFoundError, match=f"^{words}$"):
                comm.Group(given[rank], device="cpu", timeout_s=30)
            return ""
        with comm.Group(given[rank], device="cpu", timeout_s=30) as group:
            return group.algorithm_for(16)

    assert on_all("threads", 2, body) == ["", ""]
    assert on_all("threads", 3, body) == ["nccl"] * 3


@pytest.mark.parametrize(("size", "most"), [(2, 4 << 20), (4, 512 << 10), (8, 256 << 10)])
def test_what_auto_is_by_the_number_of_ranks(size, most):
    def body(rank, given, gpus):
        fusion = comm.FusionSize(2 * most // 8192, 4096)
        with comm.Group(given[rank], device="cpu", fusion=fusion) as group:
            return group.algorithm_for(most), group.algorithm_for(most * 3 // 2)

    assert on_all("threads", size, body) == [("oneshot", "vllm")] * size


def test_algorithms_have_memory_apart(rng):
    """Each has as much as its largest message takes, and leaves what the others keep there."""
    options = {"max_bytes": 1 << 16, "fusion": comm.FusionSize(11, 256, "float32")}
    most = {"vllm": 1 << 14, "nccl": 1 << 14, "oneshot": 2816, "twoshot": 2816}
    values = rng.standard_normal((2, 1 << 14)).astype(np.float32)

    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", timeout_s=10, **options) as group:
            for algorithm, count in [*most.items()] * 3:
                out = np.full(count, np.nan, np.float32)
                group.all_reduce(values[rank, :count], out, algorithm=algorithm)
                assert (out == values[:, :count].sum(0)).all(), algorithm

    on_all("threads", 2, body)


@pytest.mark.parametrize("size", [4, 8])
def test_messages_in_two_stages(size, rng):
    """Partial sums are beside the addends that others still read."""
    options, seed = {"max_bytes": MOST}, int(rng.integers(2**32))
    made: Calls = [("all_reduce", MOST // 4, 0, False, "vllm")] * 6
    found = on_all("threads", size, rank_programs.calls, options, seed, made)
    for number in range(len(made)):
        results = [of_rank[number] for of_rank in found]
        rank_programs.check("all_reduce", seed, number, MOST // 4, 0, results)


def test_messages_in_many_parts(rng):
    """Of 16 bytes: nobody writes the next one while others still read."""
    values = rng.standard_normal((4, 1 << 10)).astype(np.float32)

    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", max_bytes=16) as group:
            out = np.full((4, 1 << 10), np.nan, np.float32)
            group.all_gather(values[rank], out)
            assert (out == values).all()
            group.all_reduce(values[rank], out[0])
            assert np.abs(out[0] - values.astype(np.float64).sum(0)).max() < 1e-5

    on_all("threads", 4, body)


def test_messages_of_which_a_vector_is_more_than_max_bytes():
    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", max_bytes=30) as group:
            x = np.full(15, rank + 1, np.float16)
            group.all_reduce(x)
            assert (x == 3).all()
            return group.algorithm_for(16), group.algorithm_for(30)

    assert on_all("threads", 2, body) == [("oneshot", "nccl")] * 2


def test_shots_of_messages_that_one_shot_has_no_room_for(monkeypatch):
    """The kernels count a Lamport buffer's bytes in 32 bits; here the bound is a small one."""
    monkeypatch.setattr(fusion, "_MAX_LAMPORT", 1 << 14)

    def body(rank, given, gpus):
        size = comm.FusionSize(8, 1024, "float32")
        with comm.Group(given[rank], device="cpu", fusion=size, timeout_s=10) as group:
            x = np.full((8, 1024), rank + 1, np.float32)
            for tokens in (2, 3, 8):
                out = np.full((tokens, 1024), np.nan, np.float32)
                group.allreduce_fusion(x[:tokens], pattern="kAllReduce", allreduce_out=out)
                assert (out == 3).all()
            for call in (
                lambda: group.all_reduce(x[:3], algorithm="oneshot"),
                lambda: group.allreduce_fusion(
                    x[:3], pattern=0, allreduce_out=x[:3], use_oneshot=True
                ),
            ):
                with pytest.raises(ArgumentError, match="8192"):
                    call()
            return [group.algorithm_for(n, "float32") for n in (1 << 13, (1 << 13) + 16)]

    assert on_all("threads", 2, body) == [["oneshot", "vllm"]] * 2


def test_no_more_tokens_than_ranks_go_in_one_shot(monkeypatch):
    """However large they are: two shots are of more."""
    monkeypatch.setitem(fusion._MAX_ONESHOT, 2, 1024)

    def body(rank, given, gpus):
        size = comm.FusionSize(8, 1024, "float32")
        with comm.Group(given[rank], device="cpu", fusion=size, timeout_s=10) as group:
            x = np.full((2, 1024), rank + 1, np.float32)
            group.allreduce_fusion(x, pattern="kAllReduce", allreduce_out=x)
            assert (x == 3).all()

    on_all("threads", 2, body)


@pytest.mark.parametrize("size", fusion.SIZES)
def test_two_lamport_buffers_are_counted_in_32_bits(size):
    """However large a message is, of all sizes that there may be."""
    large = comm.FusionSize(1 << 20, 8192)
    shared = 2 * large.message_bytes + size * 256 * 4
    third = (fusion.Fusion.nbytes(large, size) - shared) // 3
    assert third > 2**29 and 2 * third < 2**31


def test_a_buffer_that_peers_read(rng):
    values = rng.standard_normal((2, 1000)).astype(np.float32)

    def body(rank, given, gpus):
        from fi_ffi.reference.arrays import as_array

        with comm.Group(given[rank], device="cpu", max_bytes=1 << 13) as group:
            x, out = group.buffer((1000,), "float32"), np.full(1000, np.nan, np.float32)
            for _ in range(3):
                as_array(x)[:] = values[rank]
                group.all_reduce(x, out, algorithm="vllm")
                assert (out == values.sum(0)).all() and (as_array(x) == values[rank]).all()
            group.all_reduce(x, algorithm="vllm")  # in place, by a copy
            assert (as_array(x) == out).all()
            inside = x.rows(10, 20)
            as_array(inside)[:] = values[rank][:10]
            group.all_reduce(inside, out[:10], algorithm="vllm")
            assert (out[:10] == values[:, :10].sum(0)).all()
            group.all_reduce(values[rank].copy(), x, algorithm="vllm")
            assert (as_array(x) == values.sum(0)).all()

    on_all("threads", 2, body)


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_without_nccl(size, rng):
    """As on GPUs where it is not installed: parts bit by bit, sums by all-reduces; in place too."""
    values = rng.standard_normal((size, 60 * size)).astype(np.float32)
    bits = rng.integers(0, 2**32, (size, 5000), np.uint32)  # more than there is memory for at once
    bits[:, :4] = 1, 0x7FC00001, 0x80000000, 0xFF800000  # as floats: tiny, not a number, -0, -inf

    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", max_bytes=1 << 12) as group:
            group._algorithms._collectives = None
            x, every = values[rank].copy(), np.full(bits.size, np.nan, np.float32)
            for _ in range(3):
                group.all_gather(bits[rank].view(np.float32), every)
                assert (every.view(np.uint32) == bits.reshape(-1)).all()
                every[:] = np.nan
            mine = x[: 15 * size + 1]
            gathered = np.full((size, len(mine)), np.nan, np.float32)
            gathered[rank] = mine
            group.all_gather(gathered[rank], gathered)
            assert (gathered == values[:, : len(mine)]).all()
            part = x[60 * rank : 60 * (rank + 1)]
            total = values.astype(np.float64).sum(0)[60 * rank : 60 * (rank + 1)]
            for out in (np.full(60, np.nan, np.float32), part):
                group.reduce_scatter(x, out)
                assert np.abs(out - total).max() < 1e-5
            with pytest.raises(ArgumentError, match=r"fi-ffi\[nccl\]"):
                group.reduce_scatter(np.zeros(2048, np.float32), np.zeros(2048 // size, np.float32))

    on_all("threads", size, body)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gather_of_ranks_that_have_fused_kernels_only(dtype, rng):
    """As many as "vllm" is not for; workspaces of float32 take no other dtype."""
    bits = rng.integers(0, 2**32, (16, 300), np.uint32)

    def body(rank, given, gpus):
        fusion = comm.FusionSize(4, 256, dtype)
        with comm.Group(given[rank], device="cpu", max_bytes=1 << 9, fusion=fusion) as group:
            assert group._algorithms.vllm is None
            group._algorithms._collectives = None
            reduce, dtypes = group._algorithms.fusion.all_reduce, set()
            group._algorithms.fusion.all_reduce = lambda x, *args, **more: (
                dtypes.add(str(x.dtype)), reduce(x, *args, **more)
            )  # fmt: skip
            every = np.full(bits.size, np.nan, np.float32)
            group.all_gather(bits[rank].view(np.float32), every)
            assert (every.view(np.uint32) == bits.reshape(-1)).all()
            assert dtypes == {dtype}

    on_all("threads", 16, body)


def test_ranks_meet():
    def body(rank, given, gpus):
        mine = given[rank]
        assert (mine.rank, mine.size) == (rank, 3)
        assert mine.broadcast(b"two" if rank == 2 else b"", root=2) == b"two"
        mine.barrier()
        found = mine.all_gather(bytes([rank]))
        mine.barrier()
        assert not mine._meeting._rounds, "of what was exchanged nothing is kept"
        return found

    assert on_all("threads", 3, body) == [[b"\0", b"\1", b"\2"]] * 3


def test_how_processes_end_their_groups():
    """Nobody frees what others still have open, nothing stays open, and an exception waits for
    nobody."""
    given = comm.processes(2, timeout_s=5.0)
    found = ranks.run("processes", 2, rank_programs.endings, given)
    for result in found:
        assert isinstance(result, tuple), result
    (_, closed), (closing, _) = (times for times, _, _ in found)
    assert closed >= closing, "rank 0 had freed its memory before rank 1 closed"
    assert [left for _, left, _ in found] == [[], []]
    assert [error for *_, error in found] == ["ZeroDivisionError", "HangError"]


def test_groups_of_processes_leave_no_descriptors():
    for first, last in on_all("processes", 2, rank_programs.descriptors, 12):
        assert first == last


def test_two_groups_of_one_process(rng):
    """One is closed and made again, a hundred times, while the other works."""
    working, others = comm.threads(4), [comm.threads(4) for _ in range(100)]
    options = {"max_bytes": MOST, "check": True, "fusion": comm.FusionSize(4, 1024)}
    seed = int(rng.integers(2**32))
    given = working, others, 0, options, seed, threading.Event()
    made = ranks.run("threads", 8, rank_programs.two_groups, *given)
    assert made[4:] == [100] * 4, made
    assert len({*made[:4]}) == 1 and made[0] > 0, made
