"""Rendezvous of ranks: threads, processes, MPI ranks, or Ray actors.

A group only needs its ranks to exchange a few bytes when it is created and closed (and, on the CPU
or with `check=True`, at every call). To use your own ranks, write a class with the three methods of
`Ranks`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError, LoaderError
from fi_ffi.ops.call.arguments import check_int, check_number

PATIENCE_S = 60.0
# Extra time for ranks that rank 0 informs about missing ones.
_GRACE_S = 5.0
_MAX_RANKS = 1024


@runtime_checkable
class Ranks(Protocol):
    """One rank of several, as a group needs it; all ranks call the same methods in the same order.

    `all_gather` and `broadcast` carry bytes. All methods raise `TimeoutError` (or its subclass
    `HangError`) if a rank is missing.
    """

    rank: int
    size: int

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return every rank's data, in the order of the ranks."""

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """Return the data of rank `root`."""

    def barrier(self) -> None:
        """Wait for every rank."""


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as text: "rank 1", "ranks 1, 3"."""
    numbers = sorted(ranks)
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


class _Ranks:
    """Base class that implements `broadcast` and `barrier` by `all_gather`."""

    rank: int
    size: int

    def all_gather(self, data: bytes) -> list[bytes]:
        raise NotImplementedError

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        root = check_int("broadcast", "root", root, 0, self.size - 1)
        return self.all_gather(data if self.rank == root else b"")[root]

    def barrier(self) -> None:
        self.all_gather(b"")

    def _late(self, seconds: float, missing: Iterable[int]) -> HangError:
        return self._hang(f"waited {round(seconds, 1):g} s for {format_ranks(missing)}")

    def _hang(self, what: str) -> HangError:
        kind = type(self).__name__
        return HangError(kind, f"{kind}: rank {self.rank} {what}")


class _Timed(_Ranks):
    """Base class of ranks that wait for `timeout_s`, or as long as a caller of `gather` says."""

    timeout_s: float

    def all_gather(self, data: bytes) -> list[bytes]:
        return self.gather(data, self.timeout_s)

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        raise NotImplementedError


class Threads(_Timed):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: _Meeting, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._meeting, self._round = meeting, 0

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        self._round += 1
        contributions = self._meeting.put(self._round, self.rank, bytes(data))
        with self._meeting.changed:
            self._meeting.changed.wait_for(lambda: len(contributions) == self.size, seconds)
            if len(contributions) < self.size:
                raise self._late(seconds, {*range(self.size)} - {*contributions})
        return [contributions[rank] for rank in range(self.size)]


class _Meeting:
    """The ranks' contributions, by round."""

    def __init__(self, size: int) -> None:
        self.size, self.changed = size, threading.Condition()
        self._rounds: dict[int, dict[int, bytes]] = {}

    def put(self, number: int, rank: int, data: bytes) -> dict[int, bytes]:
        with self.changed:
            contributions = self._rounds.setdefault(number, {})
            contributions[rank] = data
            if len(contributions) == self.size:
                del self._rounds[number]
                self.changed.notify_all()
            return contributions


class Processes(_Timed):
    """A rank that is a process, connected by pipes of `multiprocessing`; rank 0 collects.

    Pass it to its process as an argument of `Process`.
    """

    def __init__(self, rank: int, size: int, pipes: Sequence[Connection], timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._pipes = tuple(pipes)  # rank 0: one to each other rank; others: one to rank 0

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        if self.rank:
            return self._send(bytes(data), seconds)
        begun, contributions, missing = time.monotonic(), [bytes(data)], set()
        end = begun + seconds
        for rank, pipe in enumerate(self._pipes, 1):
            received = _receive(pipe, end)
            contributions.append(received or b"")
            if received is None:
                missing.add(rank)
        # Tell the ranks that came which ones are missing; otherwise they would blame rank 0.
        reply = pickle.dumps((contributions, missing))
        for rank, pipe in enumerate(self._pipes, 1):
            if rank not in missing:
                with contextlib.suppress(OSError):  # the rank has died since; the next call notices
                    pipe.send_bytes(reply)
        if missing:
            raise self._late(time.monotonic() - begun, missing)
        return contributions

    def _send(self, data: bytes, seconds: float) -> list[bytes]:
        (pipe,) = self._pipes
        begun, reply = time.monotonic(), None
        with contextlib.suppress(OSError):
            pipe.send_bytes(data)
            reply = _receive(pipe, begun + seconds + _GRACE_S)
        contributions, missing = ([], {0}) if reply is None else pickle.loads(reply)
        if missing:
            raise self._late(time.monotonic() - begun, missing)
        return list(contributions)


def _receive(pipe: Connection, end: float) -> bytes | None:
    """Return a message; None at the deadline `end` or if the other side is closed."""
    try:
        return pipe.recv_bytes() if pipe.poll(max(end - time.monotonic(), 0)) else None
    except (EOFError, OSError):
        return None


class Mpi(_Ranks):
    """A rank of an MPI communicator, through mpi4py; MPI itself detects ranks that die, and waits
    for others without end."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def all_gather(self, data: bytes) -> list[bytes]:
        return list(self._communicator.allgather(bytes(data)))

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        return bytes(self._communicator.bcast(bytes(data), root))

    def barrier(self) -> None:
        self._communicator.Barrier()


class _RayMeeting:
    """The actor where Ray's ranks exchange data."""

    def __init__(self, size: int) -> None:
        import asyncio

        self._size, self._changed = size, asyncio.Condition()
        self._rounds: dict[int, dict[int, bytes]] = {}

    async def gather(self, number: int, rank: int, data: bytes, seconds: float) -> Any:
        """Return all contributions, or the set of ranks that came if some are missing."""
        import asyncio

        async with self._changed:
            contributions = self._rounds.setdefault(number, {})
            contributions[rank] = data
            if len(contributions) == self._size:
                del self._rounds[number]
                self._changed.notify_all()
            with contextlib.suppress(asyncio.TimeoutError):
                all_here = self._changed.wait_for(lambda: len(contributions) == self._size)
                await asyncio.wait_for(all_here, seconds)
        return (
            [contributions[i] for i in range(self._size)]
            if len(contributions) == self._size
            else {*contributions}
        )


# Ray ends a meeting once the rank that made it drops its handle, even while another rank still
# waits for an answer; so the handles of the latest meetings outlive their ranks.
_LATEST_MEETINGS: collections.deque[Any] = collections.deque(maxlen=16)


class Ray(_Timed):
    """A rank that is an actor of Ray."""

    def __init__(self, name: str, rank: int, size: int, timeout_s: float) -> None:
        ray_module = _imported("ray", "ray")
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._get, self._round = ray_module.get, 0
        self._gone = ray_module.exceptions.RayActorError
        # The meeting needs no processor of its own.
        actor = ray_module.remote(_RayMeeting).options(
            name=name, get_if_exists=True, num_cpus=0, max_concurrency=_MAX_RANKS
        )
        self._meeting = actor.remote(size)
        _LATEST_MEETINGS.append(self._meeting)

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        self._round += 1
        gather = self._meeting.gather.remote
        try:
            contributions = self._get(gather(self._round, self.rank, bytes(data), seconds))
        except self._gone as error:
            raise self._hang("lost the others: the rank that came first has ended") from error
        if isinstance(contributions, set):
            raise self._late(seconds, {*range(self.size)} - contributions)
        return list(contributions)


class _Hurried(_Timed):
    """A rank that waits for the others as long as its user says, not as long as it was made for."""

    def __init__(self, ranks: _Timed, seconds: float) -> None:
        self.rank, self.size, self.timeout_s = ranks.rank, ranks.size, seconds
        self._ranks = ranks

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        return self._ranks.gather(data, seconds)


def hurried(ranks: Ranks, seconds: float) -> Ranks:
    """Return this rank with another time to wait; one that has no such time stays as it is."""
    return _Hurried(ranks, seconds) if isinstance(ranks, _Timed) else ranks


def _size(op: str, size: object, timeout_s: object) -> tuple[int, float]:
    seconds = check_number(op, "timeout_s", timeout_s, above=0)
    return check_int(op, "size", size, 1, _MAX_RANKS), seconds


def threads(size: int, *, timeout_s: float = PATIENCE_S) -> tuple[Ranks, ...]:
    """Make ranks that are threads of this process: give one to each thread.

    Args:
        size: the number of ranks.
        timeout_s: how long a rank waits for the others before it raises `HangError`.

    Raises `ArgumentError` and `ArgumentTypeError`.
    """
    count, seconds = _size("threads", size, timeout_s)
    meeting = _Meeting(count)
    return tuple(Threads(rank, count, meeting, seconds) for rank in range(count))


def processes(size: int, *, timeout_s: float = PATIENCE_S) -> tuple[Ranks, ...]:
    """Make ranks that are processes of this machine: give one to each `multiprocessing.Process`.

    Start the processes by "spawn" or "forkserver" if this process has used a GPU.  Arguments and
    errors are those of `threads`.
    """
    count, seconds = _size("processes", size, timeout_s)
    pairs = [multiprocessing.Pipe() for _ in range(count - 1)]
    first = Processes(0, count, [mine for mine, _ in pairs], seconds)
    others = (Processes(i, count, [pair[1]], seconds) for i, pair in enumerate(pairs, 1))
    return (first, *others)


def mpi(comm: Any = None) -> Ranks:
    """Return this process's rank in an mpi4py communicator; by default in `MPI.COMM_WORLD`.

    Raises `LoaderError` if mpi4py is not installed.
    """
    if comm is None:
        comm = _imported("mpi4py.MPI", "mpi4py").COMM_WORLD
    return Mpi(comm)


def ray(name: str, rank: int, size: int, *, timeout_s: float = PATIENCE_S) -> Ranks:
    """Make this Ray actor one of the ranks that meet under a name.

    Args:
        name: the same for all ranks, and used by no other actor.
        rank: this rank.
        size: the number of ranks.
        timeout_s: as for `threads`.

    Raises `LoaderError` if ray is not installed, `ArgumentError` and `ArgumentTypeError`.
    """
    count, seconds = _size("ray", size, timeout_s)
    if not isinstance(name, str) or not name:
        raise ArgumentError("ray", "name", got=repr(name), expected="a name for all ranks")
    return Ray(name, check_int("ray", "rank", rank, 0, count - 1), count, seconds)


@functools.cache
def _imported(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    # without an MPI library, mpi4py raises RuntimeError
    except (ImportError, RuntimeError) as error:
        raise LoaderError(
            f"{package} cannot be imported ({error}): pip install {package}"
        ) from error


def check_ranks(op: str, ranks: object) -> Ranks:
    """Return `ranks` after checking that the object implements `Ranks`."""
    if not isinstance(ranks, Ranks):
        got = type(ranks).__name__
        expected = "one of fi_ffi.comm.threads(...) or its like: what has rank, size, all_gather, "
        raise ArgumentTypeError(op, "ranks", got=got, expected=f"{expected}broadcast and barrier")
    return ranks
