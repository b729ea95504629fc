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
from fi_ffi.abi.tensor import DTYPES, Device, TensorDesc, parse_device
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.row import Tensor

if TYPE_CHECKING:
    from fi_ffi.ops.call.refuse import Refusals

# A device's index, and the stream's id on it. A handle is no key: it may later mean another stream,
# and the per-thread default stream has the same handle on all threads.
StreamKey = tuple[int, int]
HOST: StreamKey = -1, 0  # the key of the CPU
# The least bytes of a stream's scratch memory. It seldom grows, which a capture would forbid.
_LEAST = 1 << 20

_lock = threading.Lock()
renew_after_fork(globals(), "_lock", threading.Lock)
# The last key of each device, handle and thread: CUDA does not report a stream's id during its
# capture.
_keys: dict[tuple[int, int, int], StreamKey] = {}
# What each stream owns, by purpose.
_owned: dict[StreamKey, dict[object, Any]] = {}
# Objects that are never freed, by id: scratch that a stream outgrew (the sizes double), memory that
# another library's graph may use, and frames whose Tensor objects a callee kept.
_kept: dict[int, object] = {}


def stream_key(device: int, stream: int) -> StreamKey:
    """Return a key that identifies a stream for the life of the process; its device is current.

    CUDA does not report it during a capture. If the handle belonged to another stream before, that
    stream was destroyed: free what it owned, after waiting for GPU work that may still use it.
    """
    number = ffi.new("unsigned long long *")
    code = machine.load_cudart()[0].cudaStreamGetId(cuda.pointer(stream), number)
    if code:
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
    """Return what a stream owns; lock before changing it."""
    return _owned.setdefault(key, {})


# The objects that recorded launches use; None outside a capture.
recording_var: ContextVar[list[object] | None] = ContextVar("fi_ffi.recording", default=None)
recording: Callable[[], list[object] | None] = recording_var.get


def keep_for_graph(*things: object) -> bool:
    """Make the graph that is being recorded keep these objects; return False without one."""
    objects = recording()
    if objects is None:
        return False
    objects += (thing for thing in things if not any(thing is other for other in objects))
    return True


def keep(something: object) -> None:
    """Keep an object until the process ends."""
    _kept[id(something)] = something


def scratch_bytes(arg: Tensor, device: Device, sizes: Mapping[str, int] | None = None) -> int:
    """Return the bytes that a scratch argument needs on a device, for tensors of these sizes."""
    count = machine.multiprocessors(device.index) if device.is_cuda else 1
    demanded: int = arg.bytes_for(sizes) if arg.bytes_for and sizes is not None else 0
    return arg.bytes + arg.bytes_per_multiprocessor * count + demanded


def scratch_for(
    refuse: Refusals, arg: Tensor, device: Device, need: int, stream: object, is_own: bool
) -> TensorDesc:
    """Return scratch memory for a call that passed none: the stream's, or with `is_own` the call's
    own."""
    if is_own:
        memory = cuda.allocate(need, device, arg.zeroed)
        return _typed(memory, arg.dtype, memory)
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
        if not keep_for_graph(own) and is_captured:
            keep(own)  # another library's graph uses it
        return _typed(own, arg.dtype)


@functools.cache
def zeros(device: Device, count: int) -> TensorDesc:
    """Return `count` float32 zeros, which kernels read in place of an absent tensor."""
    of = device if device.is_cuda else parse_device("cpu")
    memory = cuda.allocate(4 * count, of, zeroed=True)
    return _typed(memory, "float32", memory)


def _typed(memory: cuda.Memory, dtype: str, owner: object = None) -> TensorDesc:
    """View memory as elements of this dtype."""
    ptr, device = memory.desc.ptr, memory.desc.device
    count = memory.desc.numel // DTYPES[dtype].itemsize
    return TensorDesc(ptr, (count,), dtype, device=device).at(ptr, owner)
