"""Where the gated delta rule's stress runs: the reference kernel on the host, or a GPU's."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.gdn import gdn_prefill

from tests.attention import machines
from tests.helpers.calls import HostArray
from tests.helpers.stress_strength import IS_SANITIZED

OP = OPS["gdn_prefill"]
# Under compute-sanitizer kernels are 10 to 100 times slower, and a library's own kernels would be
# looked at as well.
# Seconds that a stream may stand still.
LIMIT = 400.0 if IS_SANITIZED else 20.0
# Seconds after which a process that a stuck kernel holds is ended, whatever it waits for.
LAST_LIMIT = 60.0
GUARD = 256


class Cpu(machines.Cpu):
    """The reference kernel, on small versions of the same work."""

    # Of a call: heads times tokens, and sequences.
    most_heads_tokens, most_sequences = 200, 16

    # What is told of a test.
    report: Callable[[str, object], object] = staticmethod(lambda name, value: None)

    def __init__(self) -> None:
        self.launches = 0
        self.is_hung = False
        self._lock = threading.Lock()

    # How much of the work this machine is for.

    def rounds(self, count: int) -> int:
        return min(count, max(count // 50, 3))

    def lengths(self, lengths: Sequence[int], heads: int) -> tuple[int, ...]:
        """As many of the sequences, and of the first one's tokens, as the machine is for."""
        most = max(self.most_heads_tokens // heads, 2)
        kept = [min(lengths[0], most)]
        for length in lengths[1:]:
            if sum(kept) + length <= most and len(kept) < self.most_sequences:
                kept.append(length)
        return tuple(kept)

    # Memory.

    def place(self, host: np.ndarray, guard: int = GUARD) -> Any:
        return self._copy(host, guard) if host.size else machines.Nothing(host, self.device)

    def _copy(self, host: np.ndarray, guard: int) -> Any:
        return HostArray(host, guard=guard)

    def write(self, placed: Any, host: np.ndarray) -> None:
        """Put a host array's elements where another of its shape lies."""
        placed.array[...] = host

    def poison(self, placed: Any, stream: object) -> None:
        if not isinstance(placed, machines.Nothing):
            super().poison(placed, stream)

    # Work.

    def call(self, **arguments: Any) -> None:
        """One launch."""
        OP(**arguments)
        with self._lock:  # several threads launch
            self.launches += 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is launched inside is done at the end of the block, or `HangError` is raised."""
        try:
            with fi_ffi.watchdog(LIMIT, on_hang=self._tell):
                yield
            self.settle()
        except fi_ffi.HangError:
            self.is_hung = True
            raise

    def _tell(self, report: str) -> None:
        # pytest may never come to show it: the thread that launches can be stuck in the driver.
        print(f"HANG\n{report}", file=sys.__stderr__, flush=True)
        timer = threading.Timer(LAST_LIMIT, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def settle(self) -> None:
        """Wait for all streams, for `LIMIT` seconds at most, without blocking in the driver."""

    def gate(self, streams: Sequence[Any]) -> None:
        """Let the streams' further work begin together, when all of it may be queued."""

    def exact(self, inputs: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What a call must write, in float64, with the magnitude of each element."""
        return gdn_prefill(inputs)

    def close(self) -> None: ...


class Gpu(Cpu, machines.Gpu):
    """The first GPU, with the kernels in use."""

    def __init__(self) -> None:
        Cpu.__init__(self)
        if of_loader.capability(0)[0] != 9:
            pytest.skip(f"gdn_prefill is for SM90 GPUs, and this one is {of_loader.capability(0)}")
        self.need(OP.row.module)
        self._arrays: list[Any] = []
        machines.Gpu.__init__(self, self._copy, 0)
        (self.stream,) = self.streams(1)
        self._held: list[Any] = []

    def _copy(self, host: np.ndarray, guard: int) -> Any:
        from fi_ffi.cli.cuda import DeviceArray

        # A sanitizer sees what is written past an allocation's end by itself.
        self._arrays.append(DeviceArray(host, guard=0 if IS_SANITIZED else guard))
        return self._arrays[-1]

    def rounds(self, count: int) -> int:
        return count

    def lengths(self, lengths: Sequence[int], heads: int) -> tuple[int, ...]:
        return tuple(lengths)

    def write(self, placed: Any, host: np.ndarray) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        source = np.ascontiguousarray(host)
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(runtime.cudaMemcpy(placed.ptr, source.ctypes.data, source.nbytes, kind))

    def settle(self) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        deadline = time.monotonic() + LIMIT
        busy = runtime.cudaError_t.cudaErrorNotReady
        for stream in self._made:
            while (answer := runtime.cudaStreamQuery(stream))[0] == busy:
                if time.monotonic() > deadline:
                    self.is_hung = True
                    report = f"stream {stream:#x} has not done its work in {LIMIT:g} s"
                    raise fi_ffi.HangError(OP.row.name, report)
                time.sleep(1e-4)
            check(answer)

    def gate(self, streams: Sequence[Any]) -> None:
        if IS_SANITIZED:
            return
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        if not self._held:
            self._held = self.streams(1)
        self.delay(self._held[0])
        event = check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))
        check(runtime.cudaEventRecord(event, self._held[0]))
        for stream in streams:
            check(runtime.cudaStreamWaitEvent(stream, event, 0))
        check(runtime.cudaEventDestroy(event))  # when it has happened

    def capture(self, launch: Callable[[], object]) -> Callable[[], object]:
        before = self.launches
        replay = machines.Gpu.capture(self, launch)
        count, self.launches = self.launches - before, before

        def play() -> None:
            self.launches += count
            replay()

        return play

    def exact(self, inputs: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        # Many short sequences are so little work that numpy is done before it is launched.
        cupy = None if IS_SANITIZED or np.diff(inputs["cu_seqlens"]).max() < 64 else _cupy()
        if cupy is None:
            return gdn_prefill(inputs)
        found = gdn_prefill(inputs, cupy)
        return {name: (cupy.asnumpy(x), cupy.asnumpy(size)) for name, (x, size) in found.items()}

    def close(self) -> None:
        """Give everything back; nothing where a kernel hangs, for that would never end."""
        if self.is_hung:
            return
        self.settle()
        machines.Gpu.close(self)
        for array in self._arrays:
            array.free()


def _cupy() -> Any:
    try:
        import cupy
    except ImportError:
        return None
    return cupy
