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
from collections.abc import Collection, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, runtime_checkable

from fi_ffi.comm.presence import Process, check_process, this_process
from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError, LoaderError, let_through
from fi_ffi.ops.call.arguments import check_int, check_number

PATIENCE_S = 60.0
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
    """Base class that implements `broadcast` and `barrier` by `all_gather`.

    A rank belongs to the process that first calls one of these methods.
    """

    rank: int
    size: int
    _process: Process | None = None

    def all_gather(self, data: bytes) -> list[bytes]:
        raise NotImplementedError

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        root = check_int("broadcast", "root", root, 0, self.size - 1)
        return self.all_gather(data if self.rank == root else b"")[root]

    def barrier(self) -> None:
        self.all_gather(b"")

    def _check_process(self) -> None:
        self._process = self._process or this_process()
        check_process(type(self).__name__, "rank", self._process)

    def _late(self, seconds: float, missing: Iterable[int]) -> HangError:
        return self._hang(f"waited {round(seconds, 1):g} s for {format_ranks(missing)}")

    def _hang(self, what: str) -> HangError:
        kind = type(self).__name__
        return HangError(kind, f"{kind}: rank {self.rank} {what}")


class _Timed(_Ranks):
    """Base class of ranks that wait for `timeout_s`, or as long as a caller of `gather` says.

    Once a rank has given up, nobody succeeds in its round: late ranks raise `HangError` too.
    """

    timeout_s: float
    _grace_s = 0.0  # how much longer a rank may wait to be told who is missing
    _round = 0

    def all_gather(self, data: bytes) -> list[bytes]:
        return self.gather(data, self.timeout_s)

    def gather(self, data: bytes, seconds: float) -> list[bytes]:
        """Return every rank's data, if the last one comes within `seconds` of the first."""
        self._check_process()
        self._round += 1
        begun = time.monotonic()
        given, missing = self._meet(bytes(data), begun + seconds)
        if self.rank in missing:
            raise self._hang("came after another rank had given up")
        if missing:
            waited = min(time.monotonic() - begun, seconds + self._grace_s)
            raise self._late(waited, missing)
        return [given[rank] for rank in range(self.size)]

    def _meet(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        """Return the ranks' data; or the ranks that were missing when the first gave up."""
        raise NotImplementedError


class _Round:
    """What ranks bring to one round, and who was missing when the first of them gave up."""

    def __init__(self, size: int) -> None:
        self._size = self.coming = size
        self.given: dict[int, bytes] = {}
        self.missing: set[int] = set()

    def is_over(self) -> bool:
        return bool(self.missing) or len(self.given) == self._size

    def give_up(self) -> None:
        if not self.is_over():
            self.missing = {*range(self._size)} - {*self.given}


class _Rounds:
    """The rounds to which some ranks still come."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rounds: dict[int, _Round] = {}

    def come(self, number: int, rank: int, data: bytes) -> _Round:
        """Return a round after adding a rank's data, unless somebody has given it up."""
        one = self._rounds.setdefault(number, _Round(self._size))
        if not one.is_over():
            one.given[rank] = data
        one.coming -= 1
        if not one.coming:
            del self._rounds[number]
        return one


class _Meeting(_Rounds):
    """Where threads exchange data."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.changed = threading.Condition()


class Threads(_Timed):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: _Meeting, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._meeting = meeting

    def _meet(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        with self._meeting.changed:
            one = self._meeting.come(self._round, self.rank, data)
            self._meeting.changed.wait_for(one.is_over, end - time.monotonic())
            one.give_up()
            self._meeting.changed.notify_all()
        return one.given, one.missing


class Processes(_Timed):
    """A rank that is a process, connected by pipes of `multiprocessing`; rank 0 collects.

    Pass it to its process as an argument of `Process`.
    """

    _grace_s = 5.0

    def __init__(self, rank: int, size: int, pipes: Sequence[Connection], timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._pipes = tuple(pipes)  # rank 0: one to each other rank; others: one to rank 0

    def _meet(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        return self._send(data, end) if self.rank else self._collect(data, end)

    def _collect(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        begun, given, lost = time.monotonic(), {0: data}, set()
        coming: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes, 1)}
        while coming and (ready := wait([*coming], max(end - time.monotonic(), 0))):
            for pipe in ready:
                rank, message = coming[pipe], _received(pipe)
                if message is None:
                    lost.add(rank)
                elif message[0] < self._round:  # of a round that was given up
                    continue
                else:
                    _, until, given[rank] = message
                    end = min(end, until)
                del coming[pipe]
        missing = lost | {*coming.values()}
        if end < (begun if missing else time.monotonic()):
            missing = {0}
        # Tell the ranks that came which ones are missing; otherwise they would blame rank 0. Late
        # ones read it when they come.
        reply = pickle.dumps((self._round, {} if missing else given, missing))
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # the rank has died since; the next call notices
                pipe.send_bytes(reply)
        return given, missing

    def _send(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        (pipe,) = self._pipes
        with contextlib.suppress(OSError):
            pipe.send_bytes(pickle.dumps((self._round, end, data)))
            # Rank 0 has some time more, to tell of ranks that did not come by the end.
            while pipe.poll(max(end + self._grace_s - time.monotonic(), 0)):
                reply = _received(pipe)
                if reply is None:
                    break
                number, given, missing = reply
                if number == self._round:
                    return given, missing
        return {}, {0}


def _received(pipe: Any) -> tuple[Any, ...] | None:
    """Return a message; None if the other side is closed."""
    try:
        message: tuple[Any, ...] = pickle.loads(pipe.recv_bytes())
        return message
    except (EOFError, OSError) as error:
        let_through(error)
        return None


class Mpi(_Ranks):
    """A rank of an MPI communicator, through mpi4py; MPI itself detects ranks that die, and waits
    for others without end."""

    def __init__(self, communicator: Any) -> None:
        self._of_mpi = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    @property
    def _communicator(self) -> Any:
        self._check_process()
        return self._of_mpi

    def all_gather(self, data: bytes) -> list[bytes]:
        return list(self._communicator.allgather(bytes(data)))

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        return bytes(self._communicator.bcast(bytes(data), root))

    def barrier(self) -> None:
        self._communicator.Barrier()


class _RayMeeting(_Rounds):
    """The actor where Ray's ranks exchange data."""

    def __init__(self, size: int) -> None:
        import asyncio

        super().__init__(size)
        self._changed = asyncio.Condition()

    async def gather(
        self, number: int, rank: int, data: bytes, seconds: float
    ) -> tuple[dict[int, bytes], set[int]]:
        """Return the ranks' data, and who was missing when the first rank gave up."""
        import asyncio

        async with self._changed:
            one = self.come(number, rank, data)
            self._changed.notify_all()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(one.is_over), seconds)
            one.give_up()
            self._changed.notify_all()
        return one.given, one.missing


# Ray ends a meeting once the rank that made it drops its handle, even while another rank still
# waits for an answer; so the handles of the latest meetings outlive their ranks.
_LATEST_MEETINGS: collections.deque[Any] = collections.deque(maxlen=16)


class Ray(_Timed):
    """A rank that is an actor of Ray."""

    def __init__(self, name: str, rank: int, size: int, timeout_s: float) -> None:
        ray_module = _imported("ray", "ray")
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._get = ray_module.get
        self._gone = ray_module.exceptions.RayActorError
        # The meeting needs no processor of its own.
        actor = ray_module.remote(_RayMeeting).options(
            name=name, get_if_exists=True, num_cpus=0, max_concurrency=_MAX_RANKS
        )
        self._meeting = actor.remote(size)
        _LATEST_MEETINGS.append(self._meeting)

    def _meet(self, data: bytes, end: float) -> tuple[Mapping[int, bytes], Collection[int]]:
        gather, seconds = self._meeting.gather.remote, max(end - time.monotonic(), 0)
        try:
            met: tuple[dict[int, bytes], set[int]] = self._get(
                gather(self._round, self.rank, data, seconds)
            )
        except self._gone as error:
            raise self._hang("lost the others: the rank that came first has ended") from error
        return met


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


def patience(ranks: Ranks, otherwise: float) -> float:
    """Return how long a rank waits for the others in a meeting, if it has such a time."""
    return ranks.timeout_s if isinstance(ranks, _Timed) else otherwise


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
