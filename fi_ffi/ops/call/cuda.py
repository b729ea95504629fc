"""CUDA memory, copies, events and library handles, through the runtime that the kernels use.

This module launches no kernels.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import operator
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.allocator import HOST, Allocator, MemoryPool
from fi_ffi.abi.library import address_of
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import Device, TensorDesc, parse_device
from fi_ffi.errors import DeviceError, KernelError
from fi_ffi.loader import cuda_errors, machine

_HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_NO_TIMING = 2  # cudaEventDisableTiming
_CPU = parse_device("cpu")
_NOT_READY = 600  # cudaErrorNotReady
_WITHOUT_GPU = (35, 100)  # cudaErrorInsufficientDriver, cudaErrorNoDevice
_handles_lock = threading.Lock()
# Handles of CUDA libraries, by library and device. They are never destroyed: at exit the device's
# context may be gone first. Threads share them: a call does not change a cuBLASLt handle.
_handles: dict[tuple[str, Device], int] = {}


def check(code: int, what: str) -> None:
    """Raise `KernelError` for a CUDA error code, or `DeviceError` if the GPU is lost.

    Without a GPU every CUDA call fails, whatever its name: `LoaderError` says so.
    """
    if code:
        if code in _WITHOUT_GPU and not machine.device_count():
            cuda_errors.forget(machine.load_cudart()[0])
            machine.capability(0)
        raise cuda_errors.failed(machine.load_cudart()[0], code, what)


def forget(code: int, what: str) -> None:
    """Clear CUDA's error state after a failure that does not matter; raise `DeviceError` if the GPU
    is lost."""
    if code:
        cuda_errors.check_lost(machine.load_cudart()[0], code, what)


class current:  # a context manager
    """Make a CUDA device the thread's current device inside the block."""

    __slots__ = ("_before", "_device")

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        device = self._device
        self._before = machine.make_current(device.index) if device.is_cuda else None

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._before is not None:
            try:
                machine.make_current(self._before)
            except DeviceError:
                if exc_type is None:  # otherwise the block's own exception says more
                    raise


@functools.lru_cache(4096)
def pointer(address: int) -> Any:
    """Return an address or a handle as a C pointer; a loop has few of them, again and again."""
    return ffi.cast("void *", address)


class relaxed:  # a context manager
    """Allow this thread to allocate and free inside the block while any stream records a graph.

    CUDA forbids both during a capture, even on other threads, because they might wait for the
    device; the capture would be invalidated. Nothing inside the block waits for recorded work.
    """

    __slots__ = ("_mode",)

    def __enter__(self) -> None:
        self._mode = ffi.new("int *", cuda_errors.RELAXED)
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        runtime = machine.load_cudart()[0]
        if runtime.cudaThreadExchangeStreamCaptureMode(self._mode):
            cuda_errors.forget(runtime)


class _End(weakref.ref[Any]):
    __slots__ = ("give_back",)
    give_back: Callable[[], object]


_call, _at_end = operator.methodcaller("__call__"), operator.methodcaller("give_back")
# By id. A forked child has none of its parent's, and releases nothing that is its parent's.
_ends: dict[int, _End] = {}
os.register_at_fork(after_in_child=_ends.clear)


def at_end_of(owner: object, *calls: Callable[[], int]) -> Callable[[], object]:
    """Release an object's CUDA resources by C functions when it ends, or at exit, while CUDA works;
    errors are ignored. Calling the result does so at once.

    All is C code: Python runs signal handlers between its own instructions, and loses what they
    raise in a destructor. The capture mode is exchanged as by `relaxed`.
    """
    runtime, mode = machine.load_cudart()[0], ffi.new("int *", cuda_errors.RELAXED)
    end = _End(owner, _at_end)
    exchange = functools.partial(runtime.cudaThreadExchangeStreamCaptureMode, mode)
    forget_end = functools.partial(_ends.__delitem__, id(end))
    codes = map(_call, (exchange, *calls, exchange, forget_end))
    failed = itertools.compress(itertools.repeat(runtime.cudaGetLastError), codes)
    end.give_back = functools.partial(deque, map(_call, failed), 0)
    _ends[id(end)] = end
    return end.give_back


atexit.register(lambda: [end.give_back() for end in _ends.copy().values()])


def copying(target: int, source: int, count: int, is_cuda: bool = True) -> Callable[[Any], int]:
    """Return a function that queues a copy from page-locked host memory on a stream, whose C
    pointer it takes; it returns CUDA's error code. On the CPU it copies."""
    places = pointer(target), pointer(source), count
    if not is_cuda:
        return lambda _: ffi.memmove(*places) or 0
    return functools.partial(machine.load_cudart()[0].cudaMemcpyAsync, *places, _HOST_TO_DEVICE)


def copy_to_device(target: int, source: int, count: int, stream: int) -> None:
    """Queue a copy from page-locked host memory."""
    check(copying(target, source, count)(pointer(stream)), "cudaMemcpyAsync")


def synchronize(device: Device) -> None:
    """Wait for all work of a device."""
    with current(device):
        check(machine.load_cudart()[0].cudaDeviceSynchronize(), "cudaDeviceSynchronize")


def is_capturing(stream: int) -> bool:
    """Whether a stream is recording a graph."""
    status = ffi.new("int *")
    code = machine.load_cudart()[0].cudaStreamIsCapturing(pointer(stream), status)
    if code:
        check(code, "stream")
    return bool(status[0] != 0)


class Queue:
    """A stream that is asked about again and again, by one thread at a time."""

    __slots__ = ("_ask_number", "_ask_status", "_number", "_status", "handle", "pointer")

    def __init__(self, handle: int) -> None:
        runtime, stream = machine.load_cudart()[0], pointer(handle)
        self.handle, self.pointer = handle, stream
        self._status, self._number = ffi.new("int *"), ffi.new("unsigned long long *")
        self._ask_status = functools.partial(runtime.cudaStreamIsCapturing, stream, self._status)
        self._ask_number = functools.partial(runtime.cudaStreamGetId, stream, self._number)

    def is_capturing(self) -> bool:
        """Whether the stream is recording a graph."""
        code = self._ask_status()
        if code:
            check(code, "stream")
        return self._status[0] != 0  # type: ignore[no-any-return]

    def number(self) -> int:
        """Return CUDA's number of the stream, which no other has had in this process."""
        code = self._ask_number()
        if code:
            check(code, "cudaStreamGetId")
        return self._number[0]  # type: ignore[no-any-return]


class Event:
    """A CUDA event, by default without timing. An event that was never recorded is done."""

    __slots__ = ("__weakref__", "_handle", "_runtime")

    def __init__(self, timing: bool = False) -> None:
        runtime, handle = machine.load_cudart()[0], ffi.new("void **")
        self._runtime = runtime
        flags = 0 if timing else _NO_TIMING
        check(runtime.cudaEventCreateWithFlags(handle, flags), "cudaEventCreate")
        self._handle = handle[0]
        at_end_of(self, functools.partial(runtime.cudaEventDestroy, self._handle))

    def record(self, stream: Any) -> None:
        """Record the event after the work so far of a stream: a handle, or a C pointer."""
        where = pointer(stream) if type(stream) is int else stream
        code = self._runtime.cudaEventRecord(self._handle, where)
        if code:
            check(code, "event")

    def is_done(self) -> bool:
        code = self._runtime.cudaEventQuery(self._handle)
        if not code:
            return True
        if code == _NOT_READY:
            self._runtime.cudaGetLastError()  # clear it: the next caller would get this error
        else:
            check(code, "cudaEventQuery")
        return False

    def wait(self) -> None:
        """Block this thread until it is done."""
        check(machine.load_cudart()[0].cudaEventSynchronize(self._handle), "cudaEventSynchronize")

    def milliseconds_since(self, start: Event) -> float:
        """Return the time between two events with timing that are done."""
        runtime, found = machine.load_cudart()[0], ffi.new("float *")
        check(
            runtime.cudaEventElapsedTime(found, start._handle, self._handle), "cudaEventElapsedTime"
        )
        return float(found[0])

    def make_wait(self, stream: int) -> None:
        """Make a stream's further work wait for the event."""
        code = machine.load_cudart()[0].cudaStreamWaitEvent(pointer(stream), self._handle, 0)
        check(code, "cudaStreamWaitEvent")


def order(device: Device, before: int, after: int) -> None:
    """Make a stream's further work wait for what is queued on another stream."""
    with current(device):
        done = Event()
        done.record(before)
        done.make_wait(after)


class Memory:
    """Bytes that are freed with this object, by calls of the runtime or with `buffer`."""

    __slots__ = ("__weakref__", "_buffer", "desc")

    def __init__(self, desc: TensorDesc, *free: Callable[[], int], buffer: object = None) -> None:
        self.desc, self._buffer = desc, buffer
        if free:
            at_end_of(self, *free)


def allocate(count: int, device: Device, zeroed: bool = False) -> Memory:
    """Allocate device memory, or host memory if the device is the CPU."""
    if not device.is_cuda:
        return _host(count)
    with current(device), relaxed():
        runtime, slot = machine.load_cudart()[0], ffi.new("void **")
        check(runtime.cudaMalloc(slot, max(count, 1)), f"cudaMalloc of {count} bytes on {device}")
        memory = _owned(slot[0], count, device, runtime.cudaFree)
        if zeroed:  # on the per-thread stream, which captures on other streams do not affect
            stream = pointer(PER_THREAD)
            check(runtime.cudaMemsetAsync(slot[0], 0, count, stream), "cudaMemsetAsync")
            check(runtime.cudaStreamSynchronize(stream), "cudaStreamSynchronize")
    return memory


def allocate_page_locked(count: int, device: Device) -> Memory:
    """Allocate page-locked host memory, or plain memory if the device is the CPU."""
    if not device.is_cuda:
        return _host(count)
    with current(device), relaxed():
        runtime, slot = machine.load_cudart()[0], ffi.new("void **")
        check(runtime.cudaHostAlloc(slot, max(count, 1), 0), f"cudaHostAlloc of {count} bytes")
    return _owned(slot[0], count, _CPU, runtime.cudaFreeHost)


def _owned(place: Any, count: int, device: Device, free: Callable[[Any], int]) -> Memory:
    desc = TensorDesc(address_of(place), (count,), "uint8", device=device)
    return Memory(desc, functools.partial(free, place))


def _host(count: int) -> Memory:
    # 256 bytes more, to align the start as device memory is.
    buffer = ffi.new("char[]", count + 256)
    address = -(-address_of(buffer) // 256) * 256
    desc = TensorDesc(address, (count,), "uint8", device=_CPU)
    return Memory(desc, buffer=buffer)


@functools.cache
def kernel_memory() -> Allocator:
    """Return the allocator for kernels that allocate: the device's pool on a GPU, host memory on
    the CPU."""
    return Allocator({"cpu": HOST, "cuda": MemoryPool(_take_in_order, _free_in_order)})


def _take_in_order(count: int, device: Device, stream: int) -> int:
    """Allocate from the device's pool, for work queued on the stream after this."""
    with current(device):
        slot = ffi.new("void **")
        code = machine.load_cudart()[0].cudaMallocAsync(slot, max(count, 1), pointer(stream))
    if code:
        forget(code, "cudaMallocAsync")
        raise MemoryError(f"cudaMallocAsync of {count} bytes on {device}: CUDA error {code}")
    return address_of(slot[0])


def _free_in_order(address: int, device: Device, stream: int) -> None:
    """Return memory to the pool after the stream's work so far."""
    if machine.forked_after_cuda():
        return
    with current(device):
        code = machine.load_cudart()[0].cudaFreeAsync(pointer(address), pointer(stream))
    check(code, f"cudaFreeAsync on {device}")


def own_handle(library: str, device: Device) -> int:
    """Return fi_ffi's handle of a CUDA library on a device, made on first use; 0 on the CPU.

    Raises `LoaderError` if the library is not installed, and `KernelError` if it fails.
    """
    if not device.is_cuda:
        return 0
    key, create = (library, device), f"{library}Create"
    with _handles_lock:
        if key not in _handles:
            functions = machine.load_library(f"lib{library}.so.{machine.cuda_major()}")[0]
            slot = ffi.new("void **")
            with current(device), relaxed():
                status = getattr(functions, create)(slot)
            if status:
                words = f"status {status} on {device}"
                raise machine.root_cause(KernelError(create, "RuntimeError", words))
            _handles[key] = address_of(slot[0])
        return _handles[key]
