"""A GPU that is pretended: calls on "cuda:0" take all of a GPU's way, and end in the reference.

Its memory is the host's, and its streams do their work at once; what was asked of the CUDA
runtime is written down, and what a GPU's streams would wait for is told from that.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import TensorDesc, make_desc, parse_device
from fi_ffi.loader import generation
from fi_ffi.loader import machine as of_loader
from fi_ffi.loader.runtime import ensure_tvm_ffi
from fi_ffi.ops.attention import backends
from fi_ffi.ops.call import compiled, cuda, op, releases
from fi_ffi.reference import arrays

from tests.attention.machines import POISON, Cpu
from tests.helpers.calls import HostArray

CPU = parse_device("cpu")


def device_of(index: int) -> Any:
    return parse_device(f"cuda:{index}")


def current_stream(index: int = 0) -> int:
    """What a kernel on this thread would launch on."""
    return int(ffi.cast("uintptr_t", library.lib.TVMFFIEnvGetStream(2, index)))


def on_host(desc: TensorDesc) -> TensorDesc:
    return make_desc(desc.ptr, desc.shape, desc.dtype, desc.strides, CPU, desc.readonly, owner=desc)


class Runtime:
    """The CUDA runtime: it remembers what it is asked."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.work: list[tuple[Any, ...]] = []  # the log, with the kernels
        self.capturing: set[int] = set()
        self.non_blocking: set[int] = set()
        self.device, self.devices = 0, 1
        self._handles = itertools.count(0x1000, 16)

    def _say(self, what: str, *values: Any) -> int:
        said = (what, *(int(ffi.cast("uintptr_t", value)) for value in values))
        self.log.append(said)
        self.work.append(said)
        return 0

    def cudaGetLastError(self) -> int:
        return self._say("last error")

    def cudaGetErrorString(self, code: int) -> Any:
        return ffi.NULL

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        return 0

    def cudaStreamQuery(self, stream: Any) -> int:
        return 0

    def cudaGetDeviceCount(self, count: Any) -> int:
        count[0] = self.devices
        return 0

    def cudaGetDevice(self, index: Any) -> int:
        index[0] = self.device
        return 0

    def cudaSetDevice(self, index: int) -> int:
        self.device = index
        return 0

    def cudaEventCreateWithFlags(self, handle: Any, flags: int) -> int:
        handle[0] = ffi.cast("void *", next(self._handles))
        return 0

    def cudaEventDestroy(self, handle: Any) -> int:
        return 0

    def cudaEventRecord(self, event: Any, stream: Any) -> int:
        return self._say("record", event, stream)

    def cudaEventQuery(self, event: Any) -> int:
        return 0

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> int:
        return self._say("wait", event, stream)

    def cudaMemcpyAsync(self, target: Any, source: Any, count: int, kind: int, stream: Any) -> int:
        ffi.memmove(target, source, count)
        return self._say("copy", stream)

    def cudaMemset2DAsync(
        self, target: Any, pitch: int, value: int, width: int, rows: int, stream: Any
    ) -> int:
        if pitch < width:
            return 1  # cudaErrorInvalidValue
        start = int(ffi.cast("uintptr_t", target))
        for i in range(rows):
            ffi.memmove(ffi.cast("char *", start + i * pitch), bytes([value]) * width, width)
        return self._say("set", stream)

    def cudaStreamGetId(self, stream: Any, number: Any) -> int:
        number[0] = int(ffi.cast("uintptr_t", stream))
        return 0

    def cudaStreamGetFlags(self, stream: Any, flags: Any) -> int:
        flags[0] = int(int(ffi.cast("uintptr_t", stream)) in self.non_blocking)
        return 0

    def cudaStreamIsCapturing(self, stream: Any, status: Any) -> int:
        status[0] = int(int(ffi.cast("uintptr_t", stream)) in self.capturing)
        return 0


class PretendArray(HostArray):
    """An array on the pretended GPU."""

    def __init__(self, host: np.ndarray, device: str) -> None:
        super().__init__(host)
        self.device = device

    def desc(self) -> TensorDesc:
        here = fi_ffi.as_desc(self.array)
        return TensorDesc(
            here.ptr, here.shape, here.dtype, strides=here.strides, device=self.device
        )


class Pretend(Cpu):
    """A machine for the tests of attention, and of what ops do with streams."""

    device, stream = "cuda:0", 0x51

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = Runtime()
        # The stream that each call of a kernel found.
        self.seen: list[int] = []
        self._monkeypatch, self._free = monkeypatch, itertools.count(0x100, 16)
        ensure_tvm_ffi()
        real, array_of = releases.entry_for, arrays.as_array

        def entry_for(row: Any, device: Any, module: str | None = None) -> Any:
            return real(row, CPU, module)

        def as_array(desc: TensorDesc) -> Any:
            if not desc.device.is_cuda:
                return array_of(desc)
            self.seen.append(current_stream(desc.device.index))
            self.runtime.work.append(("kernel", self.seen[-1]))
            return array_of(on_host(desc))

        patch = monkeypatch.setattr
        patch(compiled, "entry_for", entry_for)
        patch(arrays, "as_array", as_array)
        patch(of_loader, "load_cudart", lambda: (self.runtime, "a pretended one"))
        patch(of_loader, "_device_count", 1)
        patch(of_loader, "thread", of_loader._Thread())  # no thread has this GPU's context
        patch(of_loader, "multiprocessors", lambda _: 4)
        patch(of_loader, "shared_memory", lambda _: 200_000)
        patch(of_loader, "capability", lambda _: (9, 0))
        patch(cuda, "allocate", self._allocate)
        patch(cuda, "allocate_page_locked", lambda count, _: cuda._host(count))
        # A handle of cuBLAS, which no reference looks at.
        monkeypatch.setattr(cuda, "_handles", {("cublasLt", device_of(i)): 1 for i in range(2)})
        # Without kernels no release is in use; the first rows are the reference's.
        patch(op, "release_in_force", lambda: "0.6.13")
        patch(backends, "release_in_force", lambda: "0.6.13")
        self.forget()

    def forget(self) -> None:
        """Drop what was learnt of calls."""
        generation.advance()

    def _allocate(self, count: int, device: Any, zeroed: bool = False) -> cuda.Memory:
        memory = cuda._host(count)
        if not zeroed:  # the first bytes tell as well as all
            few = min(count, 1 << 12)
            ffi.memmove(ffi.cast("char *", memory.desc.ptr), bytes([POISON]) * few, few)
        there = TensorDesc(memory.desc.ptr, (count,), "uint8", device=device)
        return cuda.Memory(there, buffer=memory)

    def with_devices(self, count: int) -> None:
        """Pretend to be so many GPUs."""
        self.runtime.devices = count
        self._monkeypatch.setattr(of_loader, "_device_count", count)

    def place(self, host: np.ndarray) -> Any:
        return PretendArray(host, self.device) if host.size else super().place(host)

    def streams(self, count: int) -> list[int | None]:
        return [next(self._free) for _ in range(count)]

    def poison(self, placed: Any, stream: object) -> None:
        placed.array[...] = np.nan

    def check_order(self, *streams: int | None) -> None:
        last: dict[int, int] = {}  # of each stream, the number of its last kernel or copy
        for what, stream, known in self._known():
            if stream in streams:
                late = [t for t, number in last.items() if t != stream and known[t] < number]
                assert not late, f"{what} on {stream:#x} does not wait for {late}"
                last[stream] = known[stream]
        assert {*last} == {*streams}, "a stream without work"

    def check_apart(self, *streams: int | None) -> None:
        for what, stream, known in self._known():
            waits = [t for t in streams if t != stream and known[t]]
            assert stream not in streams or not waits, f"{what} on {stream:#x} waits for {waits}"

    def _known(self) -> Iterator[tuple[str, int, Counter[Any]]]:
        """Each kernel and copy, its stream, and how many of each stream's are done by its end."""
        known: dict[int, Counter[Any]] = defaultdict(Counter)
        events: dict[int, Counter[Any]] = {}
        for what, *of in self.runtime.work:
            if what == "record":
                events[of[0]] = known[of[1]].copy()
            elif what == "wait":
                known[of[1]] |= events.get(of[0], Counter())
            elif what in ("kernel", "copy", "set"):
                known[of[0]][of[0]] += 1
                yield what, of[0], known[of[0]].copy()
