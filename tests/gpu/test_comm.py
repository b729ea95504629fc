"""Groups of ranks on GPUs: threads by shared pools and processes by CUDA IPC, against float64.

Where there are too few GPUs, ranks share them.  Processes run by turns then.  Kernels of threads
must all run at once, so that only small ones of two ranks do.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi import comm
from fi_ffi.cli import cuda
from fi_ffi.cli.cuda import check
from fi_ffi.comm import nccl
from fi_ffi.errors import ArgumentError, HangError, LoaderError
from fi_ffi.loader import machine

from tests.helpers import kernels, rank_programs, ranks
from tests.helpers.rank_programs import DTYPES, Calls
from tests.helpers.stress_strength import IS_SANITIZED, scaled

pytestmark = pytest.mark.usefixtures("other_threads")

MAKE = {"threads": comm.threads, "processes": comm.processes}
FUSION = comm.FusionSize(64, 4096)
LARGEST = 64 << 20
SIZES = (2, 4, 8)


def gpus() -> int:
    return len(cuda.gpus())


@pytest.fixture(autouse=True)
def _modules():
    for name in ("vllm_comm", "trtllm_comm"):
        kernels.need(name)


def need(count: int, kind: str = "threads") -> None:
    """So many GPUs, where ranks cannot share them."""
    if kind == "threads" and gpus() < count:
        pytest.skip(f"needs {count} GPUs")


def has_nccl(size: int) -> bool:
    """Whether so many ranks have it: a GPU each, and nccl4py."""
    try:
        nccl.imported()
    except LoaderError:
        return False
    return gpus() >= size


def on_all(kind: str, size: int, body: Any, *args: Any) -> list[Any]:
    """What a body gives on each rank, each on a GPU of its own if there are so many."""
    found = ranks.run(kind, size, body, MAKE[kind](size), min(gpus(), size), *args)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def compare(size: int, kind: str, options: dict[str, Any], seed: int, made: Calls) -> None:
    found = on_all(kind, size, rank_programs.calls, options, seed, made)
    for number, (op, n, of, *_, algorithm) in enumerate(made):
        results = [each[number] for each in found]
        if algorithm == "nccl":
            check_nccl(op, seed, number, n, of, results)
        else:
            rank_programs.check(op, seed, number, n, of, results)


def check_nccl(op: str, seed: int, number: int, n: int, of: int, found: list[np.ndarray]) -> None:
    """NCCL rounds every partial sum, and need not give all ranks the same bits."""
    dtype, size = DTYPES[of], len(found)
    given = [
        rank_programs.addend(seed, number, rank, n, dtype).astype(np.float64)
        for rank in range(size)
    ]
    total, magnitude = np.sum(given, axis=0), np.sum(np.abs(given), axis=0)
    if op == "all_gather":
        rank_programs.check(op, seed, number, n, of, found)
        return
    off = rank_programs.bound(total, magnitude, dtype, size, steps=0.5001 * size + 1)
    for got in [np.concatenate(found)] if op == "reduce_scatter" else found:
        assert (np.abs(got.astype(np.float64) - total) <= off).all()


# ------------------------------------------------------------------------------------- results


@pytest.mark.sanitizer
@pytest.mark.parametrize("algorithm", ["vllm", "oneshot", "twoshot", "auto"])
@pytest.mark.parametrize("kind", MAKE)
def test_small_messages_of_two_ranks(kind, algorithm, rng):
    """Under a sanitizer as processes: of one process it lets a kernel end before the next."""
    if IS_SANITIZED and kind == "threads":
        pytest.skip("under compute-sanitizer: needs kernels that run at once")
    need(2, kind)
    sizes = (2048, 4096) if algorithm == "twoshot" else (1, 7, 8, 1000, 4096)
    made: Calls = [
        ("all_reduce", n, of, bool(n % 2), algorithm) for n in sizes for of in (1, 2)
    ]  # fmt: skip
    options = {"max_bytes": 1 << 16, "fusion": comm.FusionSize(4, 4096), "nccl": False}
    compare(2, kind, options, int(rng.integers(2**32)), made)


def chosen(rank: int, given: Any, gpus: int) -> list[str]:
    device = rank_programs.place_of(rank, gpus).device
    with comm.Group(given[rank], device=device, nccl=False) as group:
        return [group.algorithm_for(nbytes) for nbytes in (2, 1 << 20, 1 << 23)]


@pytest.mark.parametrize("kind", MAKE)
def test_the_choice_by_default(kind):
    need(2, kind)
    one_shot = "oneshot" if machine.capability(0) >= (9, 0) else "vllm"
    assert on_all(kind, 2, chosen) == [[one_shot, one_shot, "vllm"]] * 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("of", range(3), ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("size", SIZES)
def test_all_sizes(size, kind, of, rng):
    """2 B to 64 MiB, or 4 MiB by turns, by every algorithm that there is for a size."""
    need(size, kind)
    largest = 26 if gpus() >= size else 22
    seed, itemsize = int(rng.integers(2**32)), DTYPES[of].itemsize
    fusion = comm.FusionSize(2048, 4096, DTYPES[of].name)
    made: Calls = []
    for power in range(1, largest + 1):
        n = (1 << power) // itemsize
        if not n:
            continue
        odd = int(rng.integers(max(n // 2, 1), n + 1))
        made.append(("all_reduce", odd, of, bool(power % 2), "auto" if has_nccl(size) else "vllm"))
        made.append(("all_reduce", n, of, not power % 2, "vllm"))
        if n * itemsize <= fusion.message_bytes:
            made.append(("all_reduce", n, of, bool(power % 2), "oneshot"))
        if 1 << 12 <= n * itemsize <= fusion.message_bytes:
            made.append(("all_reduce", n, of, not power % 2, "twoshot"))
    options = {"max_bytes": LARGEST, "fusion": fusion}
    found = on_all(kind, size, rank_programs.calls, options, seed, made)
    for number, (op, n, _, _, algorithm) in enumerate(made):
        results = [each[number] for each in found]
        check = check_nccl if algorithm == "auto" and has_nccl(size) else rank_programs.check
        check(op, seed, number, n, of, results)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("size", SIZES)
def test_collectives_by_nccl(size, kind, rng):
    if not has_nccl(size):
        pytest.skip(f"needs {size} GPUs and nccl4py: pip install 'fi-ffi[nccl]'")
    made: Calls = []
    for n in (1, 31, 4096, 1 << 20):
        for of in range(3):
            made.append(("all_gather", n, of, False, "nccl"))
            made.append(("reduce_scatter", n * size, of, False, "nccl"))
            made.append(("all_reduce", n, of, bool(of % 2), "nccl"))
    compare(size, kind, {"nccl": True}, int(rng.integers(2**32)), made)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("size", SIZES)
def test_collectives_without_nccl(size, kind, rng):
    need(size, kind)
    made: Calls = []
    for n in (1, 31, 4096, 1 << 17):
        for of in range(3):
            made.append(("all_gather", n, of, False, "auto"))
            made.append(("reduce_scatter", n * size, of, False, "auto"))
    options = {"nccl": False, "max_bytes": 4 << 20, "fusion": FUSION}
    compare(size, kind, options, int(rng.integers(2**32)), made)


def gathers(
    rank: int, given: Any, gpus: int, options: dict[str, Any], bits: np.ndarray
) -> list[np.ndarray]:
    """What a rank gets of all ranks' bits, by calls and by a graph of two."""
    place, found = rank_programs.place_of(rank, gpus), []
    x = place.put(bits[rank].view(np.float32))
    outs = [place.put(rank_programs.poisoned(bits.size, np.float32)) for _ in range(3)]
    with comm.Group(given[rank], device=place.device, **options) as group:
        group.all_gather(x.desc(), outs[0].desc(), stream=place.stream)
        with fi_ffi.capture(place.stream, device=place.device) as graph:
            for out in outs[1:]:
                group.all_gather(x.desc(), out.desc(), stream=place.stream)
        for _ in range(5):
            graph.launch(place.stream)
        found = [place.get(out).view(np.uint32) for out in outs]
    place.close()
    return found


@pytest.mark.parametrize("nccl", [True, False], ids=["nccl", "copies"])
@pytest.mark.parametrize("size", SIZES)
def test_every_bit_is_gathered(size, nccl, rng):
    """Numbers that sums would change among them: tiny ones, -0 and those that are none."""
    if nccl and not has_nccl(size):
        pytest.skip(f"needs {size} GPUs and nccl4py: pip install 'fi-ffi[nccl]'")
    bits = rng.integers(0, 2**32, (size, 5003), np.uint32)
    bits[:, :4] = 1, 0x7FC00001, 0x80000000, 0xFF800000
    options = {"nccl": nccl, "max_bytes": 1 << 12}  # of which a part takes several
    for results in on_all("processes", size, gathers, options, bits):
        for got in results:
            assert (got == bits.reshape(-1)).all()


@pytest.mark.parametrize("of", range(3), ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "size"), [("threads", 2), ("processes", 2), ("processes", 4),
                                            ("processes", 8)])  # fmt: skip
def test_fusion(kind, size, of, rng):
    need(size, kind)
    seed, made = int(rng.integers(2**32)), []
    for name in rank_programs.OUTS:
        for hidden in (1024, 4096, 6144):
            for tokens in (1, 3, 6, 64, 130):
                for oneshot in (True, False):
                    if oneshot or tokens > size:
                        made.append((name, tokens, hidden, of, oneshot))
    options = {"fusion": comm.FusionSize(130, 6144, DTYPES[of].name), "nccl": False}
    found = on_all(kind, size, rank_programs.fused, options, seed, made)
    for number, call in enumerate(made):
        rank_programs.check_fused(seed, number, call, [results[number] for results in found])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("size", SIZES)
def test_a_hundred_thousand_calls(size, kind, rng):
    """Of random sizes and addresses, by "vllm" almost all, and by one shot where it is quicker."""
    need(size, kind)
    count = scaled(50_000, 200)
    for fusion in (comm.FusionSize(1, 8), None):
        options = {"max_bytes": 1 << 20, "fusion": fusion, "nccl": False}
        args = (options, int(rng.integers(2**32)), count, 1 << 20, 1 << 22)
        assert on_all(kind, size, rank_programs.many, *args) == [""] * size


# -------------------------------------------------------------------------------------- graphs


def replay(
    rank: int, given: Any, gpus: int, options: dict[str, Any], seed: int, count: int, busy: bool
) -> list[Any]:
    """Graphs of calls by all kernels, replayed with new inputs; beside other streams' attention.

    The group's buffer has a graph of its own, without "vllm" on other tensors, which go through it.
    """
    place = rank_programs.place_of(rank, gpus)
    ways = ("vllm", "oneshot", "twoshot", "buffer")
    found = []
    with comm.Group(given[rank], device=place.device, **options) as group:
        xs = [place.put(np.zeros(8192, np.float16)) for _ in ways]
        outs = [place.put(np.zeros(8192, np.float16)) for _ in ways]
        buffer = group.buffer((8192,), "float16")
        with fi_ffi.capture(place.stream, device=place.device) as graph:
            for way, x, out in zip(ways[:-1], xs, outs, strict=False):
                group.all_reduce(x.desc(), out.desc(), algorithm=way, stream=place.stream)
                group.all_reduce(out.desc(), algorithm=way, stream=place.stream)
        with fi_ffi.capture(place.stream, device=place.device) as of_buffer:
            group.all_reduce(buffer, outs[-1].desc(), algorithm="vllm", stream=place.stream)
            group.all_reduce(outs[-1].desc(), algorithm="oneshot", stream=place.stream)
        noise = Noise(place) if busy else None
        for number in range(10):
            for i, x in enumerate(xs):
                values = rank_programs.addend(seed, 10 * number + i, rank, 8192, np.float16)
                write(place, x.ptr, values)
                place.poison(outs[i])
            for each in (graph, of_buffer):
                if each is of_buffer:
                    write(place, buffer.ptr, values)
                for _ in range(count // 10):
                    each.launch(place.stream)
                    if noise is not None:
                        noise.make()
            found.append([place.get(out) for out in outs])
            if noise is not None:
                noise.check()
    place.close()
    return found


class Noise:
    """Other work of the same GPU, on a stream of its own: a norm and attention, whose results are
    known: of rows of one number, and over values of one number."""

    def __init__(self, place: Any) -> None:
        self.place, self.stream = place, place.new_stream()
        bf16, pages = DTYPES[2], 64
        self.x = place.put(np.full((64, 4096), 3.0, bf16))
        self.weight = place.put(np.ones(4096, bf16))
        self.out = place.put(np.zeros((64, 4096), bf16))
        self.q = place.put(np.random.default_rng().standard_normal((8, 32, 128)).astype(bf16))
        keys = np.random.default_rng().standard_normal((pages, 16, 8, 128)).astype(bf16)
        self.cache = place.put(keys), place.put(np.full(keys.shape, 2.0, bf16))
        self.attended = place.put(np.zeros((8, 32, 128), bf16))
        self.plan = fi_ffi.BatchDecodePlan(
            np.arange(9, dtype=np.int32) * 8, np.arange(pages, dtype=np.int32),
            np.full(8, 5, np.int32), page_size=16, num_qo_heads=32, num_kv_heads=8, head_dim=128,
            q_data_type="bfloat16", device=place.device, stream=self.stream,
        )  # fmt: skip

    def make(self) -> None:
        with fi_ffi.stream(self.stream):
            fi_ffi.rmsnorm(*(each.desc() for each in (self.out, self.x, self.weight)))
            k, v = (each.desc() for each in self.cache)
            self.plan.run(self.q.desc(), k, v, self.attended.desc())

    def check(self) -> None:
        check(runtime.cudaStreamSynchronize(self.stream))
        for found, expected in ((self.out, 1.0), (self.attended, 2.0)):
            assert np.abs(self.place.get(found).astype(np.float32) - expected).max() < 0.02


def write(place: Any, address: int, values: np.ndarray) -> None:
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    check(runtime.cudaMemcpyAsync(address, values.ctypes.data, values.nbytes, kind, place.stream))
    check(runtime.cudaStreamSynchronize(place.stream))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside attention"])
@pytest.mark.parametrize(("kind", "size"), [("threads", 2), ("processes", 2), ("processes", 4),
                                            ("processes", 8)])  # fmt: skip
def test_graphs_replayed(kind, size, busy, rng):
    need(size, kind)
    if busy:
        for op, options in (
            (fi_ffi.rmsnorm, {}),
            (fi_ffi.BatchDecodePlan, {"head_dim": 128, "q_data_type": "bfloat16"}),
        ):
            found = op.supports(**options)
            if not found:
                pytest.skip(str(found))
    seed, count = int(rng.integers(2**32)), scaled(10_000, 100)
    options = {"fusion": comm.FusionSize(4, 4096), "nccl": False}
    found = on_all(kind, size, replay, options, seed, count, busy)
    for number in range(10):
        for i in range(4):
            given = [
                rank_programs.addend(seed, 10 * number + i, rank, 8192, np.float16)
                for rank in range(size)
            ]
            once = np.sum([x.astype(np.float32) for x in given], axis=0).astype(np.float16)
            again = (once.astype(np.float32) * size).astype(np.float16)
            for results in found:
                got = results[number][i]
                # In two stages parts are added in another order.
                step = np.abs(again.astype(np.float64)) * 2.0**-10 + 2.0**-13
                assert (np.abs(got.astype(np.float64) - again) <= step).all()
                assert (got == found[0][number][i]).all()


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["vllm", "oneshot", "twoshot", "graph", "nccl"])
def test_a_process_that_is_killed(how, victim):
    """The other is told in time, by name; it closes its group, and uses its GPU again."""
    is_nccl = how == "nccl"
    if is_nccl and not has_nccl(2):
        pytest.skip("needs 2 GPUs and nccl4py: pip install 'fi-ffi[nccl]'")
    # NCCL's kernels are not seen to wait, but a process that has ended is.
    patience = 60.0 if is_nccl else 2.0
    options = {"timeout_s": patience, "fusion": comm.FusionSize(4, 4096), "nccl": is_nccl}
    found = rank_programs.after_a_kill(victim, min(gpus(), 2), options, how)
    ((words, closed, again),) = found
    # What a rank notices first: its own kernel's wait, or the end of the other's process.
    noticed = ("has lost",) if is_nccl else ("s for", "has lost")
    assert any(f"{what} rank {victim}" in words for what in noticed)
    assert f"the process of rank {victim} has ended" in words
    assert closed < 30 and again == [0, 1, 2, 3, 4]


def test_one_of_eight_processes_is_killed():
    """The other seven are told in time, by name."""
    need(8)
    options = {"timeout_s": 2.0, "fusion": comm.FusionSize(4, 4096)}
    told = rank_programs.after_a_kill(5, 8, options, "vllm", 8)
    assert len(told) == 7
    for words, closed, again in told:
        assert "the process of rank 5 has ended" in words
        assert closed < 30 and again == [0, 1, 2, 3, 4]


def test_two_groups_of_one_process(rng):
    """One is closed and made again, a hundred times, while the other works."""
    need(8)
    options = {"fusion": comm.FusionSize(4, 4096)}
    working, others = comm.threads(4), [comm.threads(4) for _ in range(100)]
    seed = int(rng.integers(2**32))
    given = working, others, 8, options, seed, threading.Event()
    made = ranks.run("threads", 8, rank_programs.two_groups, *given)
    assert made[4:] == [100] * 4 and len({*made[:4]}) == 1 and made[0] > 0, made


@pytest.mark.parametrize("how", ["vllm", "oneshot", "twoshot"])
def test_a_thread_that_does_not_come(how):
    given = comm.threads(2)
    devices = min(gpus(), 2)
    options = {"timeout_s": 2.0, "fusion": comm.FusionSize(4, 4096), "nccl": False}
    gone = threading.Event()  # what is freed waits for all kernels of its GPU

    def body(rank: int) -> str:
        place = rank_programs.place_of(rank, devices)
        group = comm.Group(given[rank], device=place.device, **options)
        x = place.put(np.ones(8192, np.float16))
        group.all_reduce(x.desc(), algorithm=how, stream=place.stream)
        group.synchronize(place.stream)
        if rank == 1:
            group.close()
            gone.set()
            return ""
        gone.wait()
        for _ in range(3):  # those behind the first wait as well
            group.all_reduce(x.desc(), algorithm=how, stream=place.stream)
        with pytest.raises(HangError, match="waited 2 s for rank 1") as caught:
            group.synchronize(place.stream)
        with pytest.raises(HangError):
            group.all_reduce(x.desc(), stream=place.stream)
        group.close()
        again = place.put(np.arange(5, dtype=np.float32))
        assert (place.get(again) == np.arange(5)).all()
        return str(caught.value)

    found = ranks.run("threads", 2, body)
    assert isinstance(found[0], str) and "rank 1" in found[0], found


def test_refusals():
    given = comm.threads(2)
    devices = min(gpus(), 2)

    def body(rank: int) -> None:
        place = rank_programs.place_of(rank, devices)
        with comm.Group(given[rank], device=place.device, max_bytes=1 << 12, nccl=False) as group:
            x, large = place.put(np.ones(64, np.float16)), place.put(np.ones(1 << 12, np.float16))
            with pytest.raises(ArgumentError, match="stream"):
                group.all_reduce(x.desc())
            with pytest.raises(ArgumentError, match=r"fi-ffi\[nccl\]"):
                group.all_reduce(large.desc(), stream=place.stream)
            with pytest.raises(ArgumentError, match="the group's"):
                group.all_reduce(np.ones(4, np.float32), stream=place.stream)
            part = large.desc().rows(rank << 11, (rank + 1) << 11)
            with pytest.raises(ArgumentError, match=r"fi-ffi\[nccl\]"):
                group.reduce_scatter(large.desc(), part, stream=place.stream)
            assert (place.get(x) == 1).all() and (place.get(large) == 1).all()

    assert ranks.run("threads", 2, body) == [None, None]


def make_and_close(
    rank: int, given: Any, gpus: int, options: dict[str, Any], count: int
) -> list[int]:
    """Free memory of the GPU once a few groups were made, and once all were."""
    place = rank_programs.place_of(rank, gpus)
    x = place.put(np.ones(64, np.float16))
    marks = []
    for i in range(count):
        with comm.Group(given[rank], device=place.device, **options) as group:
            group.all_reduce(x.desc(), stream=place.stream)
            place.poison(x)
        if i in (20, count - 1):
            given[rank].barrier()
            marks.append(int(check(runtime.cudaMemGetInfo())[0]))
            given[rank].barrier()
    place.close()
    return marks


@pytest.mark.timeout(1800)
@pytest.mark.skipif(IS_SANITIZED, reason="under compute-sanitizer: its own memory grows")
@pytest.mark.parametrize("kind", MAKE)
def test_a_thousand_groups(kind):
    need(2, kind)
    options = {"max_bytes": 1 << 20, "fusion": comm.FusionSize(8, 4096), "nccl": False}
    for before, after in on_all(kind, 2, make_and_close, options, scaled(1000, 40)):
        assert before - after < 64 << 20
