"""Scratch memory of calls: each stream has its own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import renew_after_fork
from fi_ffi.abi.streams import PER_THREAD, handle_for
from fi_ffi.abi.tensor import DTYPES, Device, TensorDesc, frozen, parse_device
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.row import Tensor

if TYPE_CHECKING:
    from fi_ffi.ops.call.refuse import Refusals

# A device's index, and the stream's id on it: a handle may be another stream's later on, and
# that of a thread's own default stream is the same for all threads.
StreamKey = tuple[int, int]
HOST: StreamKey = -1, 0  # what the CPU has instead
# A stream's own memory is of so many bytes at least: it seldom grows, which a capture forbids.
_LEAST = 1 << 20
_LEAST_NUMBERS = 1024

_lock = threading.Lock()
renew_after_fork(globals(), "_lock", threading.Lock)
# What a stream's handle named last, by device, handle and thread: CUDA does not tell the id of a
# stream that records a graph.
_keys: dict[tuple[int, int, int], StreamKey] = {}
# What each stream has of its own, by what that is for.
_owned: dict[StreamKey, dict[object, Any]] = {}
# What is never given back, by its id: what streams have outgrown, twice as large each time, and
# what another library's graphs may use; and frames whose Tensor objects a callee refers to.
_kept: dict[int, object] = {}


def stream_key(device: int, stream: int) -> StreamKey:
    """What names a stream for as long as the process lives; its device is current.

    CUDA does not tell it of a stream that records a graph.  Where the handle was another
    stream's before, that one was destroyed: what it owned is given back, which waits for work
    of the GPU that may still use it.
    """
    number = ffi.new("unsigned long long *")
    code = machine.load_cudart()[0].cudaStreamGetId(cuda.pointer(stream), number)
    cuda.check(code, "cudaStreamGetId")
    key, known = (device, int(number[0])), _known(device, stream)
    before = _keys.get(known)
    if before != key:
        with _lock:
            _keys[known] = key
            gone = None if before is None else _owned.pop(before, None)
        del gone  # outside the lock
    return key


def _known(device: int, stream: int) -> tuple[int, int, int]:
    return device, stream, threading.get_ident() if stream == PER_THREAD else 0


def owned(key: StreamKey) -> dict[object, Any]:
    """What a stream has of its own; whoever changes it has a lock."""
    return _owned.setdefault(key, {})


# What the launches that a graph records touch; None where none is recorded.
recording_var: ContextVar[list[object] | None] = ContextVar("fi_ffi.recording", default=None)
recording: Callable[[], list[object] | None] = recording_var.get


def hold(*things: object) -> bool:
    """Let the graph that is being recorded hold what its launches touch; False without one."""
    held = recording()
    if held is None:
        return False
    held += (thing for thing in things if not any(thing is other for other in held))
    return True


def keep(something: object) -> None:
    """Keep what somebody may use until the process ends."""
    _kept[id(something)] = something


def check_stream(stream: object, device: Device, op: str) -> None:
    """Raise where a call has no stream, or one of another device."""
    handle_for(stream, device, op)


def scratch_bytes(arg: Tensor, device: Device, sizes: Mapping[str, int] | None = None) -> int:
    """What a scratch argument needs on a device, for tensors of these sizes."""
    count = machine.multiprocessors(device.index) if device.is_cuda else 1
    demanded: int = arg.bytes_for(sizes) if arg.bytes_for and sizes is not None else 0
    return arg.bytes + arg.bytes_per_multiprocessor * count + demanded


def scratch_for(
    refuse: Refusals, arg: Tensor, device: Device, need: int, stream: object, is_own: bool
) -> TensorDesc:
    """Memory that a call was not given: the stream's own, or with `is_own` nobody else's."""
    if is_own:
        memory = cuda.allocate(need, device, arg.zeroed)
        return _typed(arg, memory, memory)
    handle, is_captured = handle_for(stream, device, refuse.op), False
    key: StreamKey | None = HOST
    if device.is_cuda:
        is_captured = cuda.is_capturing(handle)
        if is_captured:
            key = _keys.get(_known(device.index, handle))
        else:
            with cuda.current(device):
                key = stream_key(device.index, handle)
    with _lock:
        mine, name = owned(key) if key is not None else {}, (refuse.row.name, arg.name)
        own: cuda.Memory | None = mine.get(name)
        have = 0 if own is None else own.desc.numel
        if own is None or have < need:
            if is_captured:
                expected = "memory, or a call on this stream before the capture"
                raise refuse.error(arg.name, "none", expected)
            if own is not None:
                keep(own)
            own = mine[name] = cuda.allocate(max(need, 2 * have, _LEAST), device, arg.zeroed)
        if not hold(own) and is_captured:
            keep(own)  # another library's graph uses it
        return _typed(arg, own)


@functools.cache
def zeros(device: Device, count: int) -> TensorDesc:
    """So many float32 of 0, which whoever has no other may read."""
    of = device if device.is_cuda else parse_device("cpu")
    memory = cuda.allocate(4 * count, of, zeroed=True)
    return TensorDesc(memory.desc.ptr, (count,), "float32", device=of).at(memory.desc.ptr, memory)


def counting(device: Device, count: int) -> TensorDesc:
    """The numbers from 0 on as int32, so many, which whoever has no other may read."""
    numbers = _numbers(device, max(1 << (count - 1).bit_length(), _LEAST_NUMBERS))
    return frozen(numbers.ptr, (count,), (1,), numbers.kind, numbers.owner)


@functools.cache
def _numbers(device: Device, count: int) -> TensorDesc:
    of = device if device.is_cuda else parse_device("cpu")
    memory = cuda.allocate(4 * count, of)
    numbers = ffi.new("int32_t[]", list(range(count)))
    cuda.copy_now(memory.desc.ptr, int(ffi.cast("uintptr_t", numbers)), 4 * count, of)
    return TensorDesc(memory.desc.ptr, (count,), "int32", device=of).at(memory.desc.ptr, memory)


def _typed(arg: Tensor, memory: cuda.Memory, owner: object = None) -> TensorDesc:
    """Memory as the argument's dtype."""
    dtype, device = DTYPES[arg.dtype], memory.desc.device
    count = memory.desc.numel // dtype.itemsize
    return TensorDesc(memory.desc.ptr, (count,), dtype, device=device).at(memory.desc.ptr, owner)
