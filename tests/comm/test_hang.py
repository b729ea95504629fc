"""What finds the rank that kernels wait for, and lets them go, on the references' memory.

They wait in the same words as the kernels; a GPU's are looked at in tests/gpu/test_comm.py.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.comm import hang, presence
from fi_ffi.comm.hang import Monitor, SideStreamCopies, run_with_deadline
from fi_ffi.comm.memory import place_of
from fi_ffi.comm.presence import Process, has_ended

from tests.helpers import ranks
from tests.ops.conftest import gpu  # noqa: F401

CPU = parse_device("cpu")
SIZE, LATE = 4, 2


def kernels_of(group: comm.Group, how: str):
    return group._algorithms.vllm if how == "vllm" else group._algorithms.fusion


def count_blocks(group: comm.Group, how: str, count: int) -> None:
    """Of fused kernels, which count their thread blocks while they run; references do not."""
    if how != "vllm":
        with SideStreamCopies(CPU) as copies:
            numbers = group._algorithms.fusion._numbers.desc.ptr
            copies.write(numbers, np.int32(count).tobytes())


def read_by(fusion):
    """How many bytes each look at the state reads."""
    counts = []
    with SideStreamCopies(CPU) as copies:
        fusion.state(lambda at, count: counts.append(count) or copies.read(at, count))
    return counts


@pytest.mark.parametrize("how", ["vllm", "oneshot", "twoshot"])
def test_the_missing_rank_is_told_and_what_waits_is_let_go(how):
    given, others = comm.threads(SIZE), threading.Barrier(SIZE - 1)
    told = []

    def body(rank):
        group = comm.Group(given[rank], device="cpu", fusion=comm.FusionSize(64, 256))
        x = np.full(4096, rank + 1, np.float16)
        for _ in range(4):  # an even number of times, and all of a triple buffer's turns
            group.all_reduce(x.copy(), algorithm=how)
        with SideStreamCopies(CPU) as copies:
            assert not {*kernels_of(group, how).state(copies.read)[1]}, "nobody is waited for"
        given[rank].barrier()
        if rank == LATE:
            return
        found = []
        monitor = Monitor(
            [kernels_of(group, how)], CPU, 0.5, lambda: lambda *args: found.append(args)
        )
        time.sleep(0.7)  # with nothing to wait for, for longer than a rank is waited for
        others.wait(60)
        count_blocks(group, how, 1)
        if how != "vllm":
            looked = read_by(group._algorithms.fusion)
            assert looked[:2] == [20, 4 * SIZE], "the numbers, and a flag of each rank"
        begun = time.monotonic()
        group.all_reduce(x, algorithm=how)  # of what it computes nothing is known
        took = time.monotonic() - begun
        others.wait(60)  # before anybody's next call, whose flags would look like older ones
        for _ in range(2):  # what follows is let go as well
            group.all_reduce(x, algorithm=how)
        monitor.close()
        told.append((rank, found, took))
        return

    assert ranks.run("threads", SIZE, body) == [None] * SIZE
    assert len(told) == SIZE - 1
    for _, found, took in told:
        op = "all_reduce" if how == "vllm" else "allreduce_fusion"
        assert found == [(op, {LATE}, 0.5)] and 0.4 < took < 20


def test_a_rank_that_has_ended_is_told_before_the_timeout():
    given = comm.threads(2)

    def body(rank):
        with comm.Group(given[rank], device="cpu") as group:
            x = np.zeros(64, np.float16)
            group.all_reduce(x, algorithm="vllm")
            if rank:
                return []
            found, vllm = [], group._algorithms.vllm
            on_hang = lambda: lambda *args: found.append(args)  # noqa: E731
            monitor = Monitor([vllm], CPU, 60.0, on_hang, lambda: {1})
            begun = time.monotonic()
            group.all_reduce(x, algorithm="vllm")
            assert 0.9 < time.monotonic() - begun < 20
            monitor.close()
            return found

    (told,), _ = ranks.run("threads", 2, body)
    assert told[:2] == ("all_reduce", {1}) and 1 <= told[2] < 20


def test_a_rank_that_has_ended_is_told_while_nothing_waits():
    """As for NCCL's kernels, which are not seen."""
    begun, ends, found = time.monotonic(), 1.5, []

    def ended():
        return {1} if time.monotonic() - begun > ends else set()

    monitor = Monitor([], CPU, 60.0, lambda: lambda *args: found.append(args), ended)
    time.sleep(ends + 0.5)
    assert not found
    while not found and time.monotonic() - begun < 30:
        time.sleep(0.1)
    assert time.monotonic() - begun > ends + 1
    monitor.close()
    ((op, missing, seconds),) = found
    assert (op, missing) == ("", {1}) and 1 <= seconds < 20


def test_a_rank_that_has_ended_is_told_while_a_copy_waits(monkeypatch):
    """As behind another thread's CUDA call, which waits for that rank; close does not wait."""
    monkeypatch.setattr(hang, "ENDING_S", 0.5)
    reads, found = threading.Event(), []

    class Stuck:
        op = "all_reduce"

        def state(self, read):
            reads.wait(60)
            return b"", ()

        def release(self, read, write):
            found.append("released")

    begun = time.monotonic()
    monitor = Monitor([Stuck()], CPU, 60.0, lambda: lambda *args: found.append(args), lambda: {1})
    while not found and time.monotonic() - begun < 30:
        time.sleep(0.1)
    ((op, missing, seconds),) = found
    assert (op, missing) == ("", {1}) and 1 <= seconds < 20
    closing = time.monotonic()
    monitor.close()
    assert time.monotonic() - closing < 20
    reads.set()
    monitor._threads[0].join(10)
    assert len(found) == 1  # a closed group's memory is not written


class Copies:
    """What `SideStreamCopies` asks of the CUDA runtime; its calls of a name may fail."""

    STREAM = 0x77

    def __init__(self, runtime, fails: str = "") -> None:
        self.asked = []
        real = runtime.cudaMemcpyAsync
        runtime.cudaMemcpyAsync = self._told("copy", fails, real, 3, 4)
        runtime.cudaStreamSynchronize = self._told("synchronize", fails, None, 0)
        runtime.cudaStreamDestroy = self._told("destroy", fails, None, 0)
        runtime.cudaStreamCreateWithFlags = self._told("create", fails, self._create, 1)

    def _create(self, slot, flags) -> int:
        slot[0] = ffi.cast("void *", self.STREAM)
        return 0

    def _told(self, name, fails, real, *places):
        def call(*args) -> int:
            self.asked.append((name, *(int(ffi.cast("uintptr_t", args[at])) for at in places)))
            if name == fails:
                return 700
            return real(*args) if real else 0

        return call


def test_copies_are_on_a_stream_of_their_own(gpu, rng):  # noqa: F811
    """Which waits for no other, and in either direction; each is done when it returns."""
    asked, memory = Copies(gpu.runtime).asked, rng.integers(256, size=16, dtype=np.uint8)
    before, device = memory.copy(), parse_device("cuda:0")
    with SideStreamCopies(device) as copies:
        assert copies.read(memory.ctypes.data + 2, 5) == before[2:7].tobytes()
        copies.write(memory.ctypes.data + 9, b"abc")
    before[9:12] = [*b"abc"]
    assert (memory == before).all()
    copy = [("copy", 4, 0x77), ("synchronize", 0x77)]  # cudaMemcpyDefault
    assert asked == [("create", 1), *copy, *copy, ("destroy", 0x77)]  # cudaStreamNonBlocking


@pytest.mark.parametrize("fails", ["create", "copy", "synchronize"])
def test_copies_that_fail_are_told(fails, gpu):  # noqa: F811
    made, memory = Copies(gpu.runtime, fails), np.zeros(4, np.uint8)
    with pytest.raises(fi_ffi.FiFfiError), SideStreamCopies(parse_device("cuda:0")) as copies:
        copies.read(memory.ctypes.data, 4)
    names = [name for name, *_ in made.asked]
    steps = ["create", "copy", "synchronize"]
    ends = [] if fails == "create" else ["destroy"]
    assert names == [*steps[: steps.index(fails) + 1], *ends]


def test_a_monitor_that_sees_progress_tells_nothing():
    """Calls that each take their time, longer together than the monitor's patience."""
    given = comm.threads(2)

    def body(rank):
        found = []
        with comm.Group(given[rank], device="cpu") as group:
            vllm = group._algorithms.vllm
            monitor = Monitor([vllm], CPU, 1.0, lambda: lambda *args: found.append(args))
            x = np.zeros(64, np.float16)
            for _ in range(8):
                if rank:
                    time.sleep(0.3)  # rank 0 waits for it
                group.all_reduce(x, algorithm="vllm")
            monitor.close()
        return found

    assert ranks.run("threads", 2, body) == [[], []]


def test_time_without_a_kernel_that_waits_does_not_count():
    """Of kernels whose memory is the same before they wait and while they do."""
    missing, found = set(), []

    class Kernels:
        op = "all_reduce"

        def state(self, read):
            return b"", missing

        def release(self, read, write):
            pass

    begun = time.monotonic()
    monitor = Monitor([Kernels()], CPU, 1.5, lambda: lambda *args: found.append(args))
    time.sleep(2)
    missing.add(3)
    waits = time.monotonic()
    while not found and time.monotonic() - begun < 30:
        time.sleep(0.05)
    assert time.monotonic() - waits > 1.2
    monitor.close()
    assert found == [("all_reduce", {3}, 1.5)]


def test_a_monitor_ends_with_its_group():
    class Owner:
        def tell(self, op, missing):
            pass

    class Nothing:
        op = "all_reduce"

        def state(self, read):
            return b"", ()

    owner = Owner()
    monitor = Monitor([Nothing()], CPU, 0.05, weakref.WeakMethod(owner.tell))
    assert "fi_ffi.comm.monitor" in {thread.name for thread in threading.enumerate()}
    del owner
    gc.collect()
    for thread in monitor._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_process_that_has_ended():
    """Before anybody has asked for its exit status, and after."""
    mine = place_of(CPU)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with open(f"/proc/{child.pid}/stat") as status:
            started = int(status.read().rpartition(")")[2].split()[19])
        place = mine._replace(process=Process(child.pid, started))
        assert not has_ended(mine) and not has_ended(place)
        child.kill()
        until = time.monotonic() + 20
        while not has_ended(place) and time.monotonic() < until:
            time.sleep(0.01)
        assert has_ended(place)
    assert has_ended(place) and not has_ended(place._replace(machine="another"))


@pytest.mark.parametrize(("flags", "has"), [(0x4, True), (0x40400C, True), (0x400003, False)])
def test_a_process_that_ends_by_its_flags(flags, has, monkeypatch):
    """PF_EXITING of Linux's sched.h is 4; 1 and 2 are a virtual processor's and an idle task's."""
    mine = place_of(CPU)
    status = ["0"] * 40
    status[6], status[19] = str(flags), str(mine.process.started)
    monkeypatch.setattr(presence, "_status", lambda pid: status)
    assert has_ended(mine) is has


def test_a_process_whose_number_another_has_by_now():
    mine = place_of(CPU)
    before = mine._replace(process=mine.process._replace(started=mine.process.started - 1))
    assert has_ended(before) and not has_ended(mine)


def test_a_call_that_may_never_return():
    never, begun = threading.Event(), time.monotonic()
    assert run_with_deadline(lambda: time.sleep(0.2), lambda: True)
    assert time.monotonic() - begun < 1
    assert not run_with_deadline(never.wait, lambda: time.monotonic() - begun > 1.5)
    assert 1.5 < time.monotonic() - begun < 20
    with pytest.raises(ZeroDivisionError):
        run_with_deadline(lambda: 1 / 0, lambda: False)
    never.set()
