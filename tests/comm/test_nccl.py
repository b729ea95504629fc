"""Which ranks use NCCL, and what NCCL is asked: on a pretended GPU, by stand-ins of nccl4py."""

from __future__ import annotations

import socket
import sys
import threading
import time
import types
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.abi._cffi import ffi
from fi_ffi.comm import memory, presence
from fi_ffi.errors import ArgumentError, HangError, KernelError, LoaderError
from fi_ffi.loader import machine

from tests.attention.pretend import Pretend, Runtime
from tests.helpers import ranks
from tests.helpers.hangs import until

A, B = "0000:01:00.0", "0000:02:00.0"
STREAM = 0x51
CODES = {"float16": 6, "float32": 7, "bfloat16": 9}  # ncclDataType_t


class PlacesRuntime(Runtime):
    """A CUDA runtime whose GPU is at another place for each thread; none sees another's."""

    def __init__(self, here: threading.local) -> None:
        super().__init__()
        self.here = here

    def cudaDeviceGetPCIBusId(self, text: Any, count: int, index: int) -> int:
        name = self.here.bus_id.encode() + b"\0"
        assert len(name) <= count and index == 0
        ffi.memmove(text, name, len(name))
        return 0

    def cudaDeviceGetByPCIBusId(self, index: Any, text: Any) -> int:
        return 101

    def cudaDeviceSynchronize(self) -> int:
        return 0

    def cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        stream[0] = ffi.cast("void *", 0x77)
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:
        return 0


class Nccl:
    """nccl4py as far as a group uses it; it writes down what it is asked."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        outer = self

        class UniqueId:
            def __init__(self, content: bytes) -> None:
                self.content = content

            def __bytes__(self) -> bytes:
                return self.content

            from_bytes = classmethod(lambda cls, content: cls(content))

        class Communicator:
            @classmethod
            def init(cls, size: int, rank: int, unique: UniqueId) -> Communicator:
                made = cls()
                made.ptr, made.rank = 0x900 + rank, rank
                outer.log.append(("init", size, rank, bytes(unique)))
                return made

            def destroy(self) -> None:
                outer.log.append(("destroy", self.rank))

            def abort(self) -> None:
                outer.log.append(("abort", self.rank))

        def get_unique_id() -> UniqueId:
            outer.log.append(("id",))
            return UniqueId(b"an id")

        def called(name: str) -> Any:
            return lambda *args: outer.log.append((name, *args))

        self.core = types.ModuleType("nccl.core")
        self.core.UniqueId, self.core.Communicator = UniqueId, Communicator  # type: ignore
        self.core.get_unique_id = get_unique_id  # type: ignore[attr-defined]
        self.nccl = types.ModuleType("nccl.bindings.nccl")
        self.nccl.get_version = lambda: 22703  # type: ignore[attr-defined]
        self.nccl.Comm = lambda address: ("comm", address)  # type: ignore[attr-defined]
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            setattr(self.nccl, name, called(name))

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package, bindings = types.ModuleType("nccl"), types.ModuleType("nccl.bindings")
        package.core, bindings.nccl = self.core, self.nccl  # type: ignore[attr-defined]
        for module in (package, bindings, self.core, self.nccl):
            monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Nccl:
    made = Nccl()
    made.installed(monkeypatch)
    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Where the rank of this thread is: `host` and `bus_id`."""
    here, host = threading.local(), socket.gethostname()
    gpu = Pretend(monkeypatch)
    gpu.runtime = PlacesRuntime(here)
    monkeypatch.setattr(socket, "gethostname", lambda: getattr(here, "host", host))
    for module in (memory, presence):
        monkeypatch.setattr(module, "this_machine", presence.this_machine.__wrapped__)
    monkeypatch.setattr(comm.group, "missing_kernels", lambda device: {"trtllm_comm": "not here"})
    return here


def on_all(here: threading.local, places: Any, body: Any, **options: Any) -> list[Any]:
    """What a body gives for each rank's group; "" where no group has an algorithm."""
    given = comm.threads(len(places))

    def run(rank: int) -> Any:
        here.host, here.bus_id = places[rank]
        with comm.Group(given[rank], device="cuda:0", timeout_s=10, **options) as group:
            return body(group)

    found = ranks.run("threads", len(places), run)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def algorithm(group: comm.Group) -> str:
    try:
        return group.algorithm_for(1 << 20)
    except ArgumentError as error:
        assert "pip install 'fi-ffi[nccl]'" in str(error)
        return ""


PLACES = {
    "three GPUs of one machine": ([("one", A), ("one", B), ("one", "0000:03:00.0")], True),
    "one GPU for two": ([("one", A), ("one", B), ("one", A)], False),
    "one GPU for all": ([("one", A)] * 3, False),
    "two machines that are alike": ([("one", A), ("two", A)], True),
    "two machines": ([("one", A), ("two", B)], True),
    "four machines that are alike": ([(str(n), A) for n in range(4)], True),
    "two GPUs each, at the same places": ([(h, g) for h in ("one", "two") for g in (A, B)], True),
    "two machines, and one GPU for two": ([("one", A), ("two", A), ("two", A)], False),
    "two machines, and a rank between": ([("one", A), ("two", A), ("one", A)], False),
}


@pytest.mark.parametrize("what", PLACES)
def test_ranks_that_have_a_gpu_each_use_nccl(what: str, nccl: Nccl, here: threading.local) -> None:
    """A GPU is of a machine and a place there: either may be the same for two ranks."""
    places, has = PLACES[what]
    size = len(places)
    assert on_all(here, places, algorithm) == ["nccl" if has else ""] * size
    made = sorted(entry for entry in nccl.log if entry[0] == "init")
    assert made == ([("init", size, rank, b"an id") for rank in range(size)] if has else [])
    assert nccl.log.count(("id",)) == int(has)
    ended = sorted(entry for entry in nccl.log if entry[0] in ("destroy", "abort"))
    assert ended == ([("destroy", rank) for rank in range(size)] if has else [])


def test_nccl_where_not_every_rank_has_it(
    nccl: Nccl, here: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = PLACES["two machines that are alike"][0]
    assert on_all(here, places, algorithm, nccl=False) == ["", ""]
    assert on_all(here, places, algorithm, nccl=True) == ["nccl", "nccl"]

    def version() -> int:
        if here.host == "two":
            raise RuntimeError("no libnccl.so here")
        return 22703

    monkeypatch.setattr(nccl.nccl, "get_version", version)
    nccl.log.clear()
    assert on_all(here, places, algorithm) == ["", ""]
    assert not nccl.log
    here.host = "two"
    with pytest.raises(LoaderError, match=r"no libnccl.so here.*pip install 'fi-ffi\[nccl\]'"):
        comm.Group(comm.threads(2)[1], device="cuda:0", nccl=True)


def test_a_rank_that_fails_to_join_nccl(nccl: Nccl, here: threading.local) -> None:
    """The other is told in time, and ends what it has joined should the rank still come."""
    init, joins = nccl.core.Communicator.init, threading.Event()
    devices = []

    def join(size: int, rank: int, unique: Any) -> Any:
        devices.append(here_device())
        if rank == 1:
            raise RuntimeError("out of memory")
        joins.wait(60)
        return init(size, rank, unique)

    def here_device() -> int:
        index = ffi.new("int *")
        machine.load_cudart()[0].cudaGetDevice(index)
        return index[0]

    nccl.core.Communicator.init = join
    given = comm.threads(2)

    def run(rank: int) -> None:
        here.host, here.bus_id = str(rank), A
        comm.Group(given[rank], device="cuda:0", timeout_s=0.3)

    begun = time.monotonic()
    first, second = ranks.run("threads", 2, run)
    assert time.monotonic() - begun < 30 and devices == [0, 0]
    words = "Group: rank 0 waited 0.3 s for the others to join NCCL"
    assert isinstance(first, HangError) and str(first) == words
    assert isinstance(second, KernelError) and "out of memory" in str(second)
    assert ("abort", 0) not in nccl.log
    joins.set()
    until(lambda: nccl.log.count(("abort", 0)) == 1)


def test_a_stream_that_waits_for_nccl(
    nccl: Nccl, here: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a rank that is late, which NCCL does not tell: its calls are aborted then."""
    monkeypatch.setattr(comm.group, "_LETTING_GO_S", 0.2)
    monkeypatch.setattr(comm.group, "ENDING_S", 0.0)
    is_late = threading.Event()
    monkeypatch.setattr(PlacesRuntime, "cudaEventQuery", lambda self, event: 600 * is_late.is_set())
    given, hung = comm.threads(2), threading.Event()

    def run(rank: int) -> None:
        here.host, here.bus_id = str(rank), A
        group = comm.Group(given[rank], device="cuda:0", timeout_s=0.3)
        group.synchronize(STREAM)  # is done
        given[rank].barrier()
        if rank:
            hung.wait(60)
        else:
            is_late.set()
            begun = time.monotonic()
            with pytest.raises(HangError, match=r"rank 0 waited \d+ s for the stream"):
                group.synchronize(STREAM)
            assert 0.5 <= time.monotonic() - begun < 20
            with pytest.raises(HangError, match="waited .* for the stream"):
                group.synchronize(STREAM)
            group.close()
            hung.set()

    assert ranks.run("threads", 2, run) == [None, None]
    assert ("abort", 0) in nccl.log and ("destroy", 0) not in nccl.log


@pytest.mark.parametrize("dtype", CODES)
def test_what_nccl_is_asked(dtype: str, nccl: Nccl, here: threading.local) -> None:
    """Addresses, counts of elements (of `out` for a scatter), the dtype, the sum, the stream."""
    blocks = [np.zeros(256, np.uint8) for _ in range(2)]
    x, out = (
        fi_ffi.TensorDesc(block.ctypes.data, (6,), dtype, device="cuda:0") for block in blocks
    )
    half = fi_ffi.TensorDesc(out.ptr, (3,), dtype, device="cuda:0")
    whole = fi_ffi.TensorDesc(out.ptr, (12,), dtype, device="cuda:0")

    def body(group: comm.Group) -> None:
        group.all_reduce(x, out, stream=STREAM)
        group.all_gather(x, whole, stream=STREAM)
        group.reduce_scatter(x, half, stream=STREAM)
        group.all_reduce(x, stream=STREAM)

    on_all(here, [("one", A), ("two", A)], body)
    code, end = CODES[dtype], STREAM
    for rank in range(2):
        comm_of = ("comm", 0x900 + rank)
        asked = [entry for entry in nccl.log if comm_of in entry]
        assert asked == [
            ("all_reduce", x.ptr, out.ptr, 6, code, 0, comm_of, end),
            ("all_gather", x.ptr, out.ptr, 6, code, comm_of, end),
            ("reduce_scatter", x.ptr, out.ptr, 3, code, 0, comm_of, end),
            ("all_reduce", x.ptr, x.ptr, 6, code, 0, comm_of, end),
        ]
