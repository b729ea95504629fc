"""Detection, report and release of kernels that wait for a missing rank.

A group's kernels wait on the GPU, in memory of their own rank. A thread reads this memory by copies
on its own stream, so it sees eager calls and graphs alike and does not slow them down. If a kernel
waits and nothing has changed for too long, or a second after a rank's process has ended, the group
is told which ranks are missing, and the thread writes the values that the kernels wait for. The
results of these kernels are invalid; the process goes on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import DeviceError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda

_NON_BLOCKING = 1  # cudaStreamNonBlocking
_ANY_DIRECTION = 4  # cudaMemcpyDefault
_LOOKS, _LONGEST_S = 100, 0.2  # polls within the timeout, and the longest interval
_JOINING_S = 1.0  # interval of looks at a call that may never return
_RELEASING_S = 1e-3  # interval of releases after a rank was found missing
# How long a thread or a kernel that waits for a lost rank may take to end.
ENDING_S = 10.0
# How long kernels may still work on what an ended process has sent.
ENDED_S = 1.0
Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], None]


class Waiting(Protocol):
    """Kernels that wait in their rank's memory."""

    op: str

    def state(self, read: Read) -> tuple[bytes, Iterable[int]]:
        """Return the state that calls change, and the ranks that a kernel waits for now."""

    def release(self, read: Read, write: Write) -> None:
        """Release the waiting kernels."""


class SideStreamCopies:  # a context manager
    """Context manager of copies to and from a device, on a stream independent of all others.

    On the CPU, which only tests use, the copies are plain.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._stream = device, ffi.NULL

    def __enter__(self) -> SideStreamCopies:
        if self._device.is_cuda:
            slot = ffi.new("void **")
            with cuda.current(self._device):
                code = machine.load_cudart()[0].cudaStreamCreateWithFlags(slot, _NON_BLOCKING)
            cuda.check(code, "cudaStreamCreateWithFlags")
            self._stream = slot[0]
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.is_cuda:
            destroy = machine.load_cudart()[0].cudaStreamDestroy
            cuda.at_end_of(self, functools.partial(destroy, self._stream))()

    def read(self, address: int, count: int) -> bytes:
        place = ffi.new("char[]", count)
        self._copy(place, cuda.pointer(address), count)
        return bytes(ffi.buffer(place, count))

    def write(self, address: int, data: bytes) -> None:
        self._copy(cuda.pointer(address), ffi.from_buffer(data), len(data))

    def _copy(self, target: Any, source: Any, count: int) -> None:
        if not self._device.is_cuda:
            ffi.memmove(target, source, count)
            return
        runtime = machine.load_cudart()[0]
        with cuda.current(self._device), cuda.relaxed():
            code = runtime.cudaMemcpyAsync(target, source, count, _ANY_DIRECTION, self._stream)
            code = code or runtime.cudaStreamSynchronize(self._stream)
        cuda.check(code, "a copy of what kernels wait for")


def run_with_deadline(call: Callable[[], object], is_over: Callable[[], bool]) -> bool:
    """Run a call that may never return; return whether it did, a second after `is_over` or before.

    Raises what the call raises.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="fi_ffi.comm.deadline", daemon=True)
    thread.start()
    thread.join(_JOINING_S)
    while thread.is_alive() and not is_over():
        thread.join(_JOINING_S)
    for error in errors:
        raise error
    return not thread.is_alive()


class Monitor:
    """A group's watching threads: call `on_hang()(op, ranks, seconds)` once, then release all
    kernels. `ended` returns the ranks whose processes have ended; for those the op is "" if no
    kernel of this rank is known to wait."""

    def __init__(
        self,
        kernels: Sequence[Waiting],
        device: Device,
        timeout_s: float,
        on_hang: Callable[[], Callable[[str, set[int], float], None] | None],
        ended: Callable[[], set[int]] = set,
    ) -> None:
        self._kernels, self._device, self._timeout_s = kernels, device, timeout_s
        self._on_hang, self._ended, self._stop = on_hang, ended, threading.Event()
        self._pause = min(timeout_s / _LOOKS, _LONGEST_S)
        self._op, self._told, self._telling = "", threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=target, name="fi_ffi.comm.monitor", daemon=True)
            for target in (self._run, self._watch_processes)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads. One that is still in a CUDA call a while later ends after that call."""
        self._stop.set()
        for thread in self._threads:
            thread.join(ENDING_S)

    def _is_needed(self, pause: float) -> bool:
        """Whether the group is open, after a pause."""
        return not self._stop.wait(pause) and self._on_hang() is not None

    def _watch_processes(self) -> None:
        """Tell of ended processes. It calls nothing of CUDA's, where it might wait for a thread
        that waits for the ended process."""
        since = None
        while self._is_needed(self._pause) and not self._told.is_set():
            ended, now = self._ended(), time.monotonic()
            if ended:
                since = since or now
                if now - since >= ENDED_S:
                    self._tell(self._op, ended, now - since)

    def _tell(self, op: str, ranks: set[int], seconds: float) -> None:
        with self._telling:
            tell = self._on_hang()
            if tell is not None and not self._told.is_set():
                tell(op, ranks, min(round(seconds, 1), self._timeout_s))
            self._told.set()

    def _run(self) -> None:
        # If the GPU is lost, the next call reports it.
        with contextlib.suppress(DeviceError), SideStreamCopies(self._device) as copies:
            self._watch(copies)
            self._release_kernels(copies)

    def _watch(self, copies: SideStreamCopies) -> None:
        """Return when a hang is told."""
        before: list[bytes] = []
        since = time.monotonic()
        while self._is_needed(self._pause) and not self._told.is_set():
            states_of = [(kernels, *kernels.state(copies.read)) for kernels in self._kernels]
            waiting = [(kernels.op, {*missing}) for kernels, _, missing in states_of if missing]
            now, states = time.monotonic(), [state for _, state, _ in states_of]
            if not waiting or states != before:
                before, since = states, now
            self._op, missing = waiting[0] if waiting else ("", set())
            if now - since >= self._timeout_s:
                self._tell(self._op, missing, now - since)

    def _release_kernels(self, copies: SideStreamCopies) -> None:
        """Release kernels until the group is closed, since those queued behind wait as well."""
        while self._is_needed(_RELEASING_S):
            for kernels in self._kernels:
                kernels.release(copies.read, copies.write)
