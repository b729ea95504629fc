"""Memory that GPUs of one process share: what the CUDA runtime is asked, by one that counts.

That kernels reach it is for tests/gpu/test_comm.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from fi_ffi import comm
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.comm import memory
from fi_ffi.comm.memory import PeerMemory, _pieces
from fi_ffi.comm.presence import Place, Process, this_machine, this_process
from fi_ffi.errors import KernelError
from fi_ffi.loader import machine

from tests.helpers import ranks
from tests.ops.test_cuda_memory import OUT_OF_MEMORY, Runtime

DEVICE = 1  # cudaMemLocationTypeDevice
# In the order of the calls.
STEPS = (
    *("cudaMemPoolCreate", "cudaMemPoolSetAccess", "cudaMallocFromPoolAsync"),
    *("cudaMemsetAsync", "cudaStreamSynchronize"),
)


class Shared(Runtime):
    """Memory that processes open by handles; a handle is the address here."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[int] = []
        self.flags: list[int] = []

    def cudaIpcGetMemHandle(self, handle: Any, place: Any) -> int:
        handle[0].reserved = bytes(ffi.buffer(ffi.new("void **", place))).ljust(64, b"\0")
        return 0

    def cudaIpcOpenMemHandle(self, slot: Any, handle: Any, flags: int) -> int:
        ffi.memmove(slot, ffi.buffer(ffi.addressof(handle))[0:8], 8)
        self.opened.append(int(ffi.cast("uintptr_t", slot[0])))
        self.flags.append(flags)
        return 0

    def cudaIpcCloseMemHandle(self, place: Any) -> int:
        self.opened.remove(int(ffi.cast("uintptr_t", place)))
        return 0


def test_processes_open_each_others_memory(monkeypatch):
    """As CUDA lets them: lazily enabling the peers' access, the only flag that there is."""
    made = Shared()
    monkeypatch.setattr(machine, "load_cudart", lambda: (made, "one that counts"))
    monkeypatch.setattr(machine, "_device_count", 4)
    given = comm.threads(2)
    places = [Place(this_machine(), Process(1, number), str(number)) for number in range(2)]

    def body(rank: int) -> list[int]:
        memory = PeerMemory(given[rank], places, 100, parse_device(f"cuda:{rank}"))
        memory.close()
        return memory.addresses

    found = ranks.run("threads", 2, body)
    machine.thread.bound.clear()
    assert found[0] == found[1] and len({*found[0]}) == 2
    assert made.flags == [1, 1] and made.opened == [] and made.taken == {}


class Pools(Runtime):
    """Four GPUs, named by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: dict[int, tuple[int, set[int]]] = {}  # where each is, and who else reaches it
        self.had: list[tuple[int, set[int], int]] = []
        self.enabled: list[int] = []

    def cudaDeviceGetByPCIBusId(self, index: Any, text: Any) -> int:
        index[0] = int(ffi.string(text))
        return 0

    def cudaDeviceEnablePeerAccess(self, peer: int, flags: int) -> int:
        self.enabled.append(peer)
        return 0

    def cudaMemPoolCreate(self, pool: Any, props: Any) -> int:
        if code := self._code("cudaMemPoolCreate"):
            return code
        assert (props.allocType, props.handleTypes, props.location.type) == (1, 0, DEVICE)
        rest = ffi.buffer(props)[ffi.offsetof("cudaMemPoolProps", "win32SecurityAttributes") :]
        assert bytes(rest) == bytes(8 + 64)
        pool[0] = ffi.cast("void *", next(self._handles))
        self.pools[int(ffi.cast("uintptr_t", pool[0]))] = props.location.id, set()
        return 0

    def cudaMemPoolSetAccess(self, pool: Any, access: Any, count: int) -> int:
        if code := self._code("cudaMemPoolSetAccess"):
            return code
        for each in access[0:count]:
            assert (each.location.type, each.flags) == (DEVICE, 3)
            self.pools[int(ffi.cast("uintptr_t", pool))][1].add(each.location.id)
        return 0

    def cudaMallocFromPoolAsync(self, slot: Any, count: int, pool: Any, stream: Any) -> int:
        code = self._take("cudaMallocFromPoolAsync", slot, count)
        if not code:
            self.had.append((*self.pools[int(ffi.cast("uintptr_t", pool))], count))
        return code

    def cudaMemPoolDestroy(self, pool: Any) -> int:
        del self.pools[int(ffi.cast("uintptr_t", pool))]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    made, before = Pools(), {*_pieces}
    monkeypatch.setattr(machine, "load_cudart", lambda: (made, "one that counts"))
    monkeypatch.setattr(machine, "_device_count", 4)
    yield made
    machine.thread.bound.clear()
    assert made.taken == {} and made.pools == {} and {*_pieces} == before


def places_of(gpus: list[int]) -> list[Place]:
    return [Place(this_machine(), this_process(), str(gpu)) for gpu in gpus]


@pytest.mark.parametrize("gpus", [[0, 1], [2, 0, 3], [1, 1, 2], [3, 2, 1, 0]])
def test_threads_share_pools(gpus, runtime):
    """Of exactly their GPUs, in zeroed memory; no GPU is opened to another as a whole."""
    given, places = comm.threads(len(gpus)), places_of(gpus)

    def body(rank: int) -> list[int]:
        memory = PeerMemory(given[rank], places, 100, parse_device(f"cuda:{gpus[rank]}"))
        own = memory.addresses[rank]
        assert bytes(ffi.buffer(ffi.cast("char *", own), 2 << 20)) == bytes(2 << 20)
        given[rank].barrier()
        memory.close()
        return memory.addresses

    found = ranks.run("threads", len(gpus), body)
    assert all(addresses == found[0] for addresses in found) and len({*found[0]}) == len(gpus)
    expected = sorted((gpu, sorted({*gpus} - {gpu}), 2 << 20) for gpu in gpus)
    assert sorted((at, sorted(peers), count) for at, peers, count in runtime.had) == expected
    assert runtime.enabled == []


def test_ranks_of_one_gpu_need_no_pool(runtime):
    given, places = comm.threads(2), places_of([1, 1])

    def body(rank: int) -> None:
        PeerMemory(given[rank], places, 100, parse_device("cuda:1")).close()

    assert ranks.run("threads", 2, body) == [None, None]
    assert runtime.had == [] and runtime.enabled == []


@pytest.mark.parametrize("step", STEPS)
def test_pools_that_fail_leave_nothing(step, runtime):
    given, places = comm.threads(2, timeout_s=0.3), places_of([0, 1])
    runtime.fails[step] = 0

    def body(rank: int) -> None:
        PeerMemory(given[rank], places, 100, parse_device(f"cuda:{rank}"))

    for error in ranks.run("threads", 2, body):
        assert isinstance(error, KernelError), error
        assert step in str(error) and f"CUDA error {OUT_OF_MEMORY}" in str(error)


@pytest.mark.parametrize(("seen", "expected"), [
    ([0, 1], (True, True)), ([0, None], (True, False)), ([None, None], (True, False)),
    ([0, 0], (True, True)), ([0, 2], (False, False)), ([1, 3], (True, False)),
])  # fmt: skip
def test_what_gpus_reach(seen, expected, monkeypatch):
    """GPU 2 is out of reach, and GPU 3 is reached over PCIe; None is not visible."""
    asked = []

    def attribute(which: int, mine: int, other: int) -> bool:
        asked.append((mine, other))
        return 2 not in (mine, other) if which == memory._ACCESS_SUPPORTED else max(mine, other) < 2

    monkeypatch.setattr(memory, "_index_of", lambda place: place)
    monkeypatch.setattr(memory, "_attribute", attribute)
    assert memory.peer_topology(seen) == expected
    assert all(None not in pair and pair[0] != pair[1] for pair in asked)
