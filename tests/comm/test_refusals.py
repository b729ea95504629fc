"""What groups refuse, and ranks that do not come."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.comm.memory import _pieces
from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.reference.comm import _ranks

from tests.helpers import rank_programs, ranks, remains

F32 = np.float32
NORM = comm.AllReduceFusionPattern.kARResidualRMSNorm


@pytest.fixture(autouse=True)
def exchanging() -> Iterator[None]:
    """Ranks tell each other their arguments first, which is a round of theirs, over memory that
    they share from then on; the other ranks are threads with frames and results."""
    mine = "._round", "._process", "open descriptors", "threads"
    with remains.allowed(*mine, "free frames", "found["):
        yield


def group(of, **options) -> comm.Group:
    options = {"device": "cpu", "max_bytes": 1 << 16, "timeout_s": 30.0, **options}
    return comm.Group(of, **options)


def on_all(size, body, **options):
    """What `body(group)` gives on each rank of threads; raises what a rank raises."""
    given = comm.threads(size)

    def rank_of(rank):
        with group(given[rank], **options) as made:
            return body(made)

    found = ranks.run("threads", size, rank_of)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def poisoned(n, dtype=F32):
    return np.full(n, np.nan, dtype)


# Before anything is sent: each is refused on every rank alike, and nothing waits.
WRONG = {
    "float64": (lambda g, x, o: g.all_reduce(np.zeros(4)), "all_reduce: argument `x`: got float64"),
    "no tensor": (lambda g, x, o: g.all_reduce("sum"), "`x`"),
    "another device": (
        lambda g, x, o: g.all_reduce(x, device_tensor()),
        "all_reduce: argument `out`: got cuda:0, expected cpu",
    ),
    "strides": (lambda g, x, o: g.all_reduce(np.zeros((8, 8), F32)[:, ::2]), "contiguous"),
    "another dtype": (lambda g, x, o: g.all_reduce(x, poisoned(64, np.float16)), "`out`"),
    "another size": (lambda g, x, o: g.all_reduce(x, poisoned(63)), "64 elements"),
    "shifted": (lambda g, x, o: g.all_reduce(x[:32], x[16:48]), "memory of `x`"),
    "read-only": (lambda g, x, o: g.all_reduce(x, read_only()), "read-only"),
    "algorithm": (lambda g, x, o: g.all_reduce(x, o, algorithm="ring"), "'ring'"),
    "too large": (
        lambda g, x, o: g.all_reduce(np.zeros(1 << 15, F32), algorithm="vllm"),
        "got 131072 bytes, expected at most 65536",
    ),
    "gathered": (lambda g, x, o: g.all_gather(x, o), "`out`"),
    "scattered": (lambda g, x, o: g.reduce_scatter(x, o), "2 equal parts of 64"),
    "gathered over": (lambda g, x, o: g.all_gather(x[1:3], x[:4]), "memory of `x`"),
    "buffer": (lambda g, x, o: g.buffer((1 << 15,), "float32"), "max_bytes=65536"),
}


def read_only():
    array = np.zeros(64, F32)
    array.flags.writeable = False
    return array


def device_tensor():
    from fi_ffi import TensorDesc

    return TensorDesc(4096, (64,), "float32", device="cuda:0")


@pytest.mark.parametrize("what", WRONG)
def test_bad_input(what):
    call, words = WRONG[what]

    def body(made):
        x, out = np.ones(64, F32), poisoned(64)
        with pytest.raises(ArgumentError, match=words) as caught:
            call(made, x, out)
        assert np.isnan(out).all() and (x == 1).all()
        made.all_reduce(x)  # nobody is behind
        assert (x == 2).all()
        return type(caught.value)

    assert set(on_all(2, body)) <= {ArgumentError, ArgumentTypeError}


FUSED = {
    "rows": (lambda g, x: g.allreduce_fusion(x.reshape(-1), pattern=NORM), r"\[tokens, hidden"),
    "too many": (lambda g, x: g.allreduce_fusion(np.zeros((9, 64), F32), pattern=NORM), "at most"),
    "pattern": (lambda g, x: g.allreduce_fusion(x, pattern=6), "AllReduceFusionPattern"),
    "no norm": (lambda g, x: g.allreduce_fusion(x, pattern=NORM), "residual_in"),
    "halves": (
        lambda g, x: g.allreduce_fusion(x.astype(np.float16), pattern=0), "as in FusionSize",
    ),
    "two shots": (
        lambda g, x: g.allreduce_fusion(x[:2], pattern=0, allreduce_out=x[:2], use_oneshot=False),
        "use_oneshot",
    ),
    "halves by oneshot": (
        lambda g, x: g.all_reduce(x.astype(np.float16), algorithm="oneshot"), "as in FusionSize",
    ),
    "large by oneshot": (
        lambda g, x: g.all_reduce(np.zeros(1024, F32), algorithm="oneshot"), "at most 2048",
    ),
    "short by twoshot": (
        lambda g, x: g.all_reduce(x[0, :4], algorithm="twoshot"), "more than 2 rows",
    ),
    "thin by twoshot": (
        lambda g, x: g.all_reduce(x[0, :12], algorithm="twoshot"), "of at least 2 vectors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FUSED)
def test_bad_fusion(what):
    call, words = FUSED[what]

    def body(made):
        x = np.ones((8, 64), F32)
        with pytest.raises(ArgumentError, match=words):
            call(made, x)
        made.allreduce_fusion(x, pattern="kAllReduce", allreduce_out=x)
        assert (x == 2).all()

    on_all(2, body, fusion=comm.FusionSize(8, 64, "float32"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device"),
        ({"max_bytes": 8}, "max_bytes"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"check": 1}, "check"),
        ({"nccl": "yes"}, "nccl"),
        ({"fusion": (8, 64)}, "FusionSize"),
        ({"fusion": comm.FusionSize(0, 64)}, "max_tokens"),
        ({"fusion": comm.FusionSize(8, 64, "int8")}, "dtype"),
        ({"fusion": comm.FusionSize(1, 7)}, "multiple of 16"),
    ],
)
def test_bad_groups(options, words):
    with pytest.raises(ArgumentError, match=words):
        group(comm.threads(1)[0], **options)


def test_six_ranks():
    """For which `trtllm_comm` has no kernels."""

    def body(made):
        x, out = np.ones((4, 64), F32), poisoned(64)
        with pytest.raises(ArgumentError, match="auto, vllm, nccl"):
            made.all_reduce(x[0], out, algorithm="oneshot")
        with pytest.raises(ArgumentError, match="without trtllm_comm"):
            made.allreduce_fusion(x, pattern=NORM)
        assert np.isnan(out).all() and (x == 1).all()

    on_all(6, body)


def test_fusion_of_three_ranks():
    with pytest.raises(ArgumentError, match="3 ranks, expected None, or 2, 4, 8 or 16 ranks"):
        on_all(3, lambda made: None, fusion=comm.FusionSize(8, 64))


def test_three_ranks_are_told_why_there_is_no_vllm():
    def body(made):
        with pytest.raises(ArgumentError, match="'vllm', with 3 ranks"):
            made.all_reduce(np.zeros(4, F32), algorithm="vllm")
        assert made.algorithm_for(64) == "nccl"

    on_all(3, body)


@pytest.mark.parametrize("make", [comm.threads, comm.processes])
def test_bad_ranks(make):
    for size in (0, -1, "two", 1.0):
        with pytest.raises(ArgumentError, match="size"):
            make(size)
    with pytest.raises(ArgumentError, match="timeout_s"):
        make(2, timeout_s=-1)
    for rank in (-1, 2):
        with pytest.raises(ArgumentError, match="from 0 to 1"):
            comm.ray("a", rank, 2)


def meet(rank, given):
    with pytest.raises(HangError) as caught:
        given[rank].barrier()
    return str(caught.value)


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("make", [comm.threads, comm.processes])
def test_ranks_that_do_not_come_are_named(make, absent):
    given = make(3, timeout_s=2.0)
    found = ranks.run(make.__name__, 3, meet, given, absent=[absent])
    for rank, told in enumerate(found):
        if rank != absent:
            # What it has waited: rank 0 tells the others, and gets some seconds more to do so.
            assert re.search(rf"rank {rank} waited [1-8](\.\d)? s for rank {absent}$", told), told


@pytest.mark.parametrize("make", [comm.threads, comm.processes])
def test_a_group_waits_as_long_as_it_says(make):
    """Not as long as its ranks were made for, which is a minute."""
    for rank, most in ((0, 10.0), (1, 20.0)):  # rank 0 has some seconds more, to tell the others
        mine = make(2)[rank]
        begun = time.monotonic()
        missing = rf"waited [0-9.]+ s for rank {1 - rank}$"
        with pytest.raises(HangError, match=missing):
            group(mine, timeout_s=0.3)
        assert time.monotonic() - begun < most
        assert mine.timeout_s == 60.0


def test_without_a_time_of_its_own_a_group_takes_its_ranks_time():
    mine = comm.threads(2, timeout_s=0.3)[0]
    with pytest.raises(HangError, match=r"rank 0 waited 0\.3 s for rank 1$"):
        comm.Group(mine, device="cpu")
    assert comm.Group(comm.threads(1, timeout_s=0.3)[0], device="cpu").timeout_s == 60.0


def test_a_rank_that_does_not_come_to_close():
    """Nor to a call with `check`: the group's time counts there too."""
    given = comm.threads(2)

    def body(rank):
        made = group(given[rank], timeout_s=0.3, check=True)
        if rank:
            return
        begun = time.monotonic()
        with pytest.raises(HangError, match="waited 0.3 s for rank 1"):
            made.all_reduce(np.zeros(4, F32))
        assert time.monotonic() - begun < 5

    assert ranks.run("threads", 2, body) == [None, None]


@pytest.mark.skipif(machine.device_count() > 0, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(
        LoaderError, match=r"^there is no cuda:0: this process sees 0 GPUs: `fi-ffi"
    ):
        comm.Group(comm.threads(1)[0])
    for ask in (cuda.Event, lambda: cuda.allocate(8, fi_ffi.parse_device("cuda:0"))):
        with pytest.raises(LoaderError, match=r"^there is no cuda:0: this process sees 0 GPUs"):
            ask()


def test_a_rank_that_has_ended_is_not_waited_for():
    first, second = comm.processes(2, timeout_s=60.0)
    for pipe in second._pipes:
        pipe.close()
    with pytest.raises(HangError, match=r"rank 0 waited 0(\.\d)? s for rank 1$"):
        first.barrier()


def test_what_is_no_rank():
    with pytest.raises(ArgumentTypeError, match="all_gather, broadcast and barrier"):
        group(object())


def test_packages_that_are_not_here(monkeypatch):
    import sys

    for name in ("mpi4py", "mpi4py.MPI", "ray", "nccl", "nccl.core"):
        monkeypatch.setitem(sys.modules, name, None)
    from fi_ffi.comm import nccl
    from fi_ffi.comm import ranks as of_ranks

    of_ranks._imported.cache_clear()
    for call in (comm.mpi, lambda: comm.ray("a", 0, 2), nccl.imported):
        with pytest.raises(LoaderError, match="pip install"):
            call()
    of_ranks._imported.cache_clear()


# ------------------------------------------------------------------------- ranks that disagree


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_bytes", 1 << 12, "65536 on rank 1, expected 4096, as on rank 0"),
        ("check", True, "False on rank 1, expected True, as on rank 0"),
        ("fusion", comm.FusionSize(8, 64), "None on rank 1"),
    ],
)
def test_groups_of_other_arguments(name, value, words):
    given = comm.threads(2)

    def body(rank):
        with pytest.raises(ArgumentError, match=words):
            group(given[rank], **({name: value} if rank == 0 else {}))

    assert ranks.run("threads", 2, body) == [None, None]


DISAGREE = {
    "size": lambda g: g.all_reduce(np.zeros(8 + 8 * g.rank, F32)),
    "dtype": lambda g: g.all_reduce(np.zeros(8, (F32, np.float16)[g.rank])),
    "op": lambda g: (
        g.all_reduce(np.zeros(8, F32)) if g.rank else g.all_gather(np.zeros(8, F32), poisoned(16))
    ),
    "algorithm": lambda g: g.all_reduce(np.zeros(8, F32), algorithm=("vllm", "nccl")[g.rank]),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_disagreement(what):
    def body(made):
        with pytest.raises(ArgumentError, match=r"on rank 1, expected .*, as on rank 0"):
            DISAGREE[what](made)
        x = np.ones(8, F32)
        made.all_reduce(x)
        assert (x == 2).all()

    on_all(2, body, check=True)


# --------------------------------------------------------------------------------- endings


@pytest.mark.parametrize("size", [1, 2])
def test_closed(size):
    def body(made):
        made.close()
        made.close()
        for call in (made.all_reduce, lambda x: made.all_gather(x, x), made.synchronize):
            with pytest.raises(ArgumentError, match="closed group"):
                call(np.zeros(4, F32))
        assert "closed" in repr(made) and not made.is_open
        with pytest.raises(TypeError, match="pickle its ranks"):
            made.__reduce__()

    on_all(size, body)


@pytest.mark.parametrize("kind", ["oneshot", "vllm", "nccl", "check", "gather"])
def test_a_thread_that_does_not_come(kind):
    """The others are told of it in time, by name, and can go on with another group."""
    given, again = comm.threads(4, timeout_s=2.0), comm.threads(3)
    options = {"timeout_s": 1.0, "check": kind == "check", "fusion": comm.FusionSize(8, 64)}

    def body(rank):
        made = group(given[rank], **options)
        x = np.ones(64, ml_dtypes.bfloat16)
        made.all_reduce(x)
        if rank == 2:
            return None
        begun = time.monotonic()
        call = made.all_gather if kind == "gather" else made.all_reduce
        more = {} if kind in ("check", "gather") else {"algorithm": kind}
        with pytest.raises(HangError, match=r"(waited|Threads).*for rank 2\b") as caught:
            call(x, np.zeros(256 if kind == "gather" else 64, x.dtype), **more)
        assert time.monotonic() - begun < 20
        with pytest.raises(HangError, match="can only be closed"):
            made.all_reduce(x)
        assert not made.is_open
        made.close()
        with group(again[rank - (rank > 2)]) as other:
            other.all_reduce(x)
        assert (x == 12).all()
        return caught.value.op

    op = "all_gather" if kind == "gather" else "all_reduce"
    assert ranks.run("threads", 4, body) == [op, op, None, op]


@pytest.mark.parametrize(
    ("size", "victim", "how"), [(2, 0, "vllm"), (2, 1, "oneshot"), (2, 1, "nccl"), (8, 5, "vllm")]
)
def test_a_process_that_is_killed(size, victim, how):
    """No other waits for it as long as for one that may come."""
    options = {"timeout_s": 100.0, "fusion": comm.FusionSize(8, 4096)}
    told = rank_programs.after_a_kill(victim, 0, options, how, size)
    assert len(told) == size - 1
    for words, closed, again in told:
        assert re.search(rf"waited \d\d?(\.\d)? s for rank {victim}\b", words), words
        # Another rank may have ended by then, too: it has been told the same.
        assert re.search(rf"the process of ranks? ([\d, ]+, )?{victim}\b.* has ended", words), words
        assert closed < 30 and again == [0, 1, 2, 3, 4]


def test_an_exception_ends_a_block_without_waiting():
    given = comm.threads(2)

    def body(rank):
        made = group(given[rank])
        with pytest.raises(ZeroDivisionError) if rank == 0 else contextlib.nullcontext(), made:
            if rank == 0:
                raise ZeroDivisionError

    begun = time.monotonic()
    ranks.run("threads", 2, body)
    assert time.monotonic() - begun < 25


class Leaving:
    """A rank whose peer, of the same process, does not come to a meeting."""

    rank, size = 0, 2

    def __init__(self, meetings: int) -> None:
        self.left = meetings

    def all_gather(self, data: bytes) -> list[bytes]:
        self.left -= 1
        if self.left < 0:
            raise TimeoutError("rank 1 has left")
        return [data, data]

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        return self.all_gather(data)[root]

    def barrier(self) -> None:
        self.all_gather(b"")


@pytest.mark.parametrize("meetings", range(5))
def test_a_group_that_is_not_made_leaves_nothing(meetings):
    """Whichever of the four meetings it is to which the other does not come."""
    before = len(_pieces), len(_ranks)
    is_made = False
    with contextlib.suppress(TimeoutError), group(Leaving(meetings), fusion=comm.FusionSize(8, 64)):
        is_made = True
    assert is_made == (meetings == 4)
    assert (len(_pieces), len(_ranks)) == before


def test_many_groups_leave_nothing():
    given = comm.threads(2)

    def body(rank):
        x = np.ones(16, F32)
        for i in range(300):
            with group(given[rank], fusion=comm.FusionSize(8, 64)) as made:
                made.all_reduce(x)
            if i == 20:
                marks[rank] = resident()
        return resident() - marks[rank]

    marks = {}
    before = len(_pieces), len(_ranks)
    grown = ranks.run("threads", 2, body)
    assert (len(_pieces), len(_ranks)) == before
    assert max(grown) < 20 << 20, "of 300 groups of 250 kB each, none stays"


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
