"""Memory from CUDA, by a runtime at the C boundary that counts it: failures leave none behind."""

from __future__ import annotations

import gc

import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.steps.memory import copy_now, counting

from tests.attention import pretend

GPU = parse_device("cuda:0")
OUT_OF_MEMORY = 2


class Runtime(pretend.Runtime):
    """The host's memory, poison at first. `fails`: by function, the calls that are right before."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, object] = {}
        self.fails: dict[str, int] = {}

    def _code(self, name: str) -> int:
        self.fails[name] = self.fails.get(name, 1 << 30) - 1
        return OUT_OF_MEMORY if self.fails[name] < 0 else 0

    def _take(self, name: str, slot, count: int) -> int:
        if code := self._code(name):
            return code
        memory = ffi.new("char[]", b"\xa5" * (count - 1))
        slot[0] = ffi.cast("void *", memory)
        self.taken[int(ffi.cast("uintptr_t", memory))] = memory
        return 0

    def _free(self, place) -> int:
        del self.taken[int(ffi.cast("uintptr_t", place))]
        return 0

    def cudaMalloc(self, slot, count: int) -> int:
        return self._take("cudaMalloc", slot, count)

    def cudaHostAlloc(self, slot, count: int, flags: int) -> int:
        return self._take("cudaHostAlloc", slot, count)

    def cudaFree(self, place) -> int:
        return self._free(place)

    def cudaFreeHost(self, place) -> int:
        return self._free(place)

    def cudaMemsetAsync(self, place, value: int, count: int, stream) -> int:
        ffi.memmove(place, bytes([value]) * count, count)
        return self._code("cudaMemsetAsync")

    def cudaStreamSynchronize(self, stream) -> int:
        return self._code("cudaStreamSynchronize")

    def cudaMemcpyAsync(self, target, source, count: int, kind: int, stream) -> int:
        super().cudaMemcpyAsync(target, source, count, kind, stream)
        return self._code("cudaMemcpyAsync")

    cudaMemcpy = cudaMemcpyAsync


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(machine, "load_cudart", lambda: (made, "one that counts"))
    monkeypatch.setattr(machine, "_device_count", 1)
    yield made
    gc.collect()
    assert made.taken == {}


def bytes_of(memory: cuda.Memory) -> bytes:
    return bytes(ffi.buffer(cuda.pointer(memory.desc.ptr), memory.desc.numel))


def test_memory_lives_as_long_as_its_object(runtime):
    memories = [cuda.allocate(100, GPU, zeroed) for zeroed in (True, False)]
    assert [bytes_of(memory)[:99] for memory in memories] == [bytes(99), b"\xa5" * 99]
    memories.append(cuda.allocate_page_locked(10, GPU))
    assert {memory.desc.ptr for memory in memories} == {*runtime.taken}
    assert memories[0].desc.device is GPU and memories[2].desc.device.type == "cpu"
    del memories[1:]
    assert {*runtime.taken} == {memories[0].desc.ptr}


def test_copies_that_are_done_at_once(runtime, rng):
    memory, data = cuda.allocate(100, GPU), rng.bytes(100)
    source = ffi.from_buffer(data)
    runtime.fails = {"cudaStreamSynchronize": 1}
    copy_now(memory.desc.ptr, int(ffi.cast("uintptr_t", source)), 100, GPU)
    assert bytes_of(memory) == data
    for name in ("cudaStreamSynchronize", "cudaMemcpyAsync"):
        runtime.fails = {name: 0}
        with pytest.raises(fi_ffi.KernelError, match=name):
            copy_now(memory.desc.ptr, int(ffi.cast("uintptr_t", source)), 100, GPU)


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaMemsetAsync", "cudaStreamSynchronize"])
def test_memory_that_could_not_be_zeroed_is_freed(name, runtime):
    runtime.fails = {name: 0}
    with pytest.raises(fi_ffi.KernelError) as caught:
        cuda.allocate(100, GPU, zeroed=True)
    assert caught.value is not None
    del caught
    gc.collect()
    assert runtime.taken == {}


@pytest.mark.parametrize("kept", [0, 1])
def test_a_workspace_that_could_not_be_had_in_full(kept, runtime):
    runtime.fails = {"cudaMalloc": kept}
    with pytest.raises(fi_ffi.KernelError):
        fi_ffi.Workspace.allocate(GPU, 1000, 100)
    gc.collect()
    assert runtime.taken == {}
    runtime.fails = {}
    workspace = fi_ffi.Workspace.allocate(GPU, 1000, 100)
    assert len(runtime.taken) == 2
    del workspace
    assert runtime.taken == {}


def test_numbers_that_could_not_be_copied(runtime):
    runtime.fails = {"cudaMemcpyAsync": 0}
    for _ in range(2):  # nor are they kept for the next call
        with pytest.raises(fi_ffi.KernelError):
            counting(GPU, 70_000, 3)
        gc.collect()
        assert runtime.taken == {}
