"""Forked children, which leave their parents' groups alone, and ranks that come too late.

A rank is too late once another has given up: it must not succeed alone.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import threading
import time
from typing import Any

import numpy as np
import pytest

from fi_ffi import comm
from fi_ffi.comm.attendance import Attendance
from fi_ffi.comm.memory import PeerMemory, make_file, map_file
from fi_ffi.comm.presence import Place, Process, this_process
from fi_ffi.comm.ranks import Mpi, _RayMeeting
from fi_ffi.errors import ArgumentError, HangError, LoaderError

from tests.helpers import ranks
from tests.helpers.forking import in_child

pytestmark = pytest.mark.usefixtures("other_threads")

MAKE = {"threads": comm.threads, "processes": comm.processes}
CALLS = ("vllm", "oneshot", "nccl", "all_gather", "reduce_scatter", "fused")
FUSION = comm.FusionSize(4, 64, "float32")


def group_of(of: Any, **options: Any) -> comm.Group:
    options = {"max_bytes": 1 << 12, "fusion": FUSION, "timeout_s": 60.0, **options}
    return comm.Group(of, device="cpu", **options)


def call(group: comm.Group, how: str, x: np.ndarray) -> np.ndarray:
    """What a rank gets, NaN where nothing was written."""
    if how == "all_gather":
        out = np.full(group.size * x.size, np.nan, np.float32)
        group.all_gather(x, out)
    elif how == "reduce_scatter":
        out = np.full(x.size // group.size, np.nan, np.float32)
        group.reduce_scatter(x, out)
    else:
        out = np.full(x.shape, np.nan, np.float32)
        if how == "fused":
            group.allreduce_fusion(x.reshape(1, -1), pattern=0, allreduce_out=out.reshape(1, -1))
        else:
            group.all_reduce(x, out, algorithm=how)
    return out


def all_done(found: list[Any]) -> None:
    for result in found:
        if isinstance(result, BaseException):
            raise result


def happening(kind: str) -> Any:
    return threading.Event() if kind == "threads" else ranks.processes().Event()


# --------------------------------------------------------------------------------------- forks


def leaves_alone(group: comm.Group, mine: Any, parent: int) -> None:
    """What a child finds of a group and its rank that are its parent's, without waiting."""
    begun, x = time.monotonic(), np.ones(64, np.float32)
    for how in CALLS:
        with pytest.raises(ArgumentError, match=f"got a group of process {parent}, expected one"):
            call(group, how, x)
    with pytest.raises(ArgumentError, match=f"got a group of process {parent}"):
        group.buffer((4,), "float32")
    with pytest.raises(ArgumentError, match=f"got a group of process {parent}"):
        group.synchronize()
    for meet in (mine.barrier, lambda: mine.broadcast(b"1"), lambda: mine.all_gather(b"2")):
        with pytest.raises(ArgumentError, match=f"got a rank of process {parent}"):
            meet()
    with pytest.raises(ArgumentError, match=f"got a rank of process {parent}"):
        group_of(mine)
    assert not group.is_open
    group.close()
    assert "closed" not in repr(group), "it is not the child's to close"
    with pytest.raises(ZeroDivisionError), group:
        raise ZeroDivisionError
    with group_of(comm.threads(1)[0]) as own:
        own.all_reduce(x)
    del group
    gc.collect()
    assert time.monotonic() - begun < 30


def forking(rank: int, given: Any) -> list[Any]:
    """Sums before and after every rank has forked, and how the children ended."""
    found: list[Any] = []
    with group_of(given[rank]) as group:
        for number in range(3):
            x = np.full(64, rank + number, np.float32)
            found += [float(call(group, how, x)[-1]) for how in CALLS]
            child = functools.partial(leaves_alone, group, given[rank], os.getpid())
            found.append(in_child(child))
    assert not group.is_open
    return found


@pytest.mark.parametrize("kind", MAKE)
def test_a_forked_child_leaves_its_parents_group_alone(kind):
    found = ranks.run(kind, 2, forking, MAKE[kind](2))
    all_done(found)
    expected = []
    for number in range(3):
        total = 2 * number + 1
        expected += [total, total, total, number + 1, total, total, 0]
    assert found == [expected] * 2


class Communicator:
    """One of mpi4py that has one rank."""

    Get_rank, Get_size = (lambda self: 0), (lambda self: 1)

    def allgather(self, data: bytes) -> list[bytes]:
        return [data]

    def bcast(self, data: bytes, root: int) -> bytes:
        return data

    def Barrier(self) -> None:
        pass


@pytest.mark.parametrize("make", [lambda: comm.threads(1)[0], lambda: Mpi(Communicator())])
def test_a_rank_belongs_to_the_process_that_first_uses_it(make):
    """So that a rank made before a fork is of the child to which it is given."""
    fresh, used = make(), make()
    assert used.all_gather(b"1") == [b"1"]

    def child() -> None:
        fresh.barrier()
        assert fresh.broadcast(b"2") == b"2"
        for meet in (used.barrier, lambda: used.broadcast(b""), lambda: used.all_gather(b"")):
            with pytest.raises(ArgumentError, match=f"a rank of process {os.getppid()}"):
                meet()

    assert in_child(child) == 0
    used.barrier()


# ----------------------------------------------------------------------------------- too late


def late_to_meet(rank: int, given: Any, kind: str, late: int, gone: Any) -> list[str]:
    """What a rank is told of a meeting to which one comes too late, and of the next one."""
    told, collects = [], kind == "processes" and late == 0
    if rank == late:
        gone.wait(60)
        if collects:
            time.sleep(2)  # the others wait some seconds longer to be told who is missing
    elif collects:
        gone.set()
    try:
        told.append(repr(given[rank].all_gather(bytes([rank]))))
    except HangError as error:
        told.append(str(error))
    if rank != late:
        gone.set()
    told.append(repr(given[rank].all_gather(bytes([rank + 8]))))
    return told


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("kind", MAKE)
def test_ranks_that_come_too_late_to_meet(kind, late):
    """They are told so, the others are told of them, and the next meeting is of all."""
    given = MAKE[kind](3, timeout_s=0.5)
    found = ranks.run(kind, 3, late_to_meet, given, kind, late, happening(kind))
    all_done(found)
    name = kind.capitalize()
    for rank, (first, second) in enumerate(found):
        if rank == late:
            assert first == f"{name}: rank {rank} came after another rank had given up"
        else:
            assert first.startswith(f"{name}: rank {rank} waited ") and f"for rank {late}" in first
        assert second == repr([b"\x08", b"\x09", b"\x0a"])


def test_actors_that_come_too_late_to_meet():
    async def meets() -> list[Any]:
        meeting = _RayMeeting(3)
        first = await asyncio.gather(*(meeting.gather(1, i, b"%d" % i, 0.2 + i) for i in (0, 1)))
        late = await meeting.gather(1, 2, b"2", 60.0)
        given, missing = (
            await asyncio.gather(*(meeting.gather(2, i, b"%d" % i, 60.0) for i in range(3)))
        )[-1]
        assert not meeting._rounds, "of what was exchanged nothing is kept"
        return [*(lost for _, lost in first), late[1], missing, given]

    begun = time.monotonic()
    assert asyncio.run(meets()) == [{2}, {2}, {2}, set(), {0: b"0", 1: b"1", 2: b"2"}]
    assert time.monotonic() - begun < 30


def late_to_open(rank: int, given: Any, gone: Any) -> str:
    """What a rank is told that has exchanged addresses, and then takes its time."""
    if rank == 1:
        open_peer = PeerMemory._open

        def late(self: PeerMemory, *args: Any) -> int:
            if self._ranks.rank == 1:
                gone.wait(60)
            return open_peer(self, *args)

        PeerMemory._open = late  # type: ignore[method-assign]
    try:
        group_of(given[rank], timeout_s=1.0)
    except HangError as error:
        return str(error)
    finally:
        gone.set()
        if rank == 1:
            PeerMemory._open = open_peer  # type: ignore[method-assign]
    return ""


SECONDS = r"[1-9](\.\d)?"  # 1, or more on a busy machine


@pytest.mark.parametrize("kind", MAKE)
def test_a_rank_that_opens_memory_that_is_freed_already(kind):
    told = ranks.run(kind, 2, late_to_open, MAKE[kind](2), happening(kind))
    all_done(told)
    name = kind.capitalize()
    assert re.fullmatch(rf"{name}: rank 0 waited {SECONDS} s for rank 1", told[0]), told
    assert told[1] == f"{name}: rank 1 came after another rank had given up"


def test_a_rank_that_cannot_open_memory_is_named():
    """On all ranks, and at once."""
    open_peer, given = PeerMemory._open, comm.threads(3)

    def fails(self: PeerMemory, *args: Any) -> int:
        if self._ranks.rank == 1:
            raise LoaderError("out of something")
        return open_peer(self, *args)

    def body(rank: int) -> None:
        words = "out of something" if rank == 1 else "rank 1 cannot open .*: out of something"
        with pytest.raises(LoaderError, match=f"^{words}$"):
            group_of(given[rank], fusion=None)

    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeerMemory, "_open", fails)
        all_done(ranks.run("threads", 3, body))
    assert time.monotonic() - begun < 30


def test_a_file_that_another_has_replaced():
    file = make_file("one", 8)
    assert map_file(this_process(), file, 8)[:] == bytes(8)
    other = make_file("another", 8)
    os.dup2(other.descriptor, file.descriptor)
    with pytest.raises(LoaderError, match="no longer there"):
        map_file(this_process(), file, 8)
    os.close(other.descriptor)
    os.close(file.descriptor)
    with pytest.raises(LoaderError, match="cannot be opened"):
        map_file(this_process(), file, 8)


def late_to_call(rank: int, given: Any, how: str, gone: Any) -> tuple[str, float]:
    """What a rank is told of a call to which rank 1 comes too late, and after which time."""
    group, x = group_of(given[rank], timeout_s=1.0 if rank == 0 else 60.0), np.ones(64, np.float32)
    assert call(group, how, x)[0] == (1.0 if how == "all_gather" else 2.0)
    if rank:
        gone.wait(60)
        assert not group.is_open
    begun, out = time.monotonic(), np.zeros(0)
    try:
        out = call(group, how, x)
    except HangError as error:
        return str(error), time.monotonic() - begun
    finally:
        gone.set()
        group.close()
    return f"got {out}", 0.0


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("kind", MAKE)
def test_a_rank_that_comes_too_late_to_call(kind, how):
    found = ranks.run(kind, 2, late_to_call, MAKE[kind](2), how, happening(kind))
    all_done(found)
    (first, _), (second, seconds) = found
    assert re.search(rf"rank 0 waited {SECONDS} s for rank 1", first), first
    why = r"(given up by|the process of) rank 0( has ended)?"
    assert re.fullmatch(rf"rank 1 has lost rank 0 \({why}\); the group can only be closed", second)
    assert seconds < 30


@pytest.mark.parametrize("kind", MAKE)
def test_a_rank_that_begins_a_call_in_time_and_is_too_late_then(kind):
    found = ranks.run(kind, 2, slow_in_a_call, MAKE[kind](2), happening(kind))
    all_done(found)
    assert "for rank 1;" in found[0] and "rank 1 has lost rank 0 (" in found[1], found


def slow_in_a_call(rank: int, given: Any, gone: Any) -> str:
    """What a rank is told of a call for which rank 1 has been checked when rank 0 gives up."""
    group, x = group_of(given[rank], timeout_s=0.5 if rank == 0 else 60.0), np.ones(64, np.float32)
    of_name = group._algorithms.all_reduce

    def slow(name: str) -> Any:
        gone.wait(60)
        return of_name(name)

    if rank == 1:
        group._algorithms.all_reduce = slow
    try:
        group.all_reduce(x, algorithm="oneshot")  # in which nobody is waited for twice
    except HangError as error:
        return str(error)
    finally:
        gone.set()
        group.close()
    return f"got {x}"


def leaving(rank: int, given: Any, calls: int) -> str:
    """How a rank ends whose peer leaves its block by an exception, after some calls."""
    x = np.ones(64, np.float32)
    try:
        with group_of(given[rank], timeout_s=60.0) as group:
            for _ in range(calls):
                assert call(group, "vllm", x)[0] == 2, "this sum is of both"
            if rank == 0:
                raise ZeroDivisionError
            call(group, "vllm", x)
    except (ZeroDivisionError, HangError) as error:
        return type(error).__name__
    return "it went on"


def test_ranks_that_may_not_open_each_others_files():
    """Each knows of itself alone, and learns of the others from its timeout."""
    places = [Place("a machine", this_process(), ""), Place("a machine", Process(1, 0), "")]
    mine = Attendance(1, 2)
    mine.share(places, [mine.file._replace(descriptor=1 << 20), mine.file])
    mine.leave(3)
    assert mine.given_up() == set()
    mine.close_file()


@pytest.mark.parametrize("calls", [0, 1, 5])
@pytest.mark.parametrize("kind", MAKE)
def test_a_rank_whose_peer_left_by_an_exception(kind, calls):
    """It is told at once, and not of a call that both have made."""
    begun = time.monotonic()
    found = ranks.run(kind, 2, leaving, MAKE[kind](2), calls)
    assert found == ["ZeroDivisionError", "HangError"], found
    assert time.monotonic() - begun < 30
