"""CUDA streams: whatever names one, and which one this thread launches on.

libtvm_ffi keeps a current stream per thread and device; kernels launch on it.
It is only ever changed here, and always put back.
"""

from __future__ import annotations

import numbers
import operator
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.abi.failure import check
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

# cudaStreamPerThread; handles up to it are default streams, of the device that is current.
PER_THREAD = 2
_STREAM = "an int handle, or a cuda.core, cuda-python, cupy or torch stream"


def stream_handle(stream: object, op: str = "stream") -> int:
    """The `cudaStream_t` of a stream, as an int (0 is the legacy default stream).

    Accepts an int, anything with the `__cuda_stream__` protocol (cuda.core), a
    cuda-python `CUstream` or `cudaStream_t`, and a torch or cupy stream.
    """
    kind = type(stream)
    try:
        handle = stream if kind is int else _handle_of(stream)
    except Exception as error:  # a stream that was destroyed, say: in its own words
        got = f"a {kind.__module__}.{kind.__qualname__} that refused: {error}"
        raise ArgumentError(op, "stream", got=got, expected=_STREAM) from error
    if type(handle) is not int:
        got = f"{kind.__module__}.{kind.__qualname__} {printed(stream)}"
        raise ArgumentTypeError(op, "stream", got=got, expected=_STREAM)
    if not 0 <= handle < 2**64:
        raise ArgumentError(op, "stream", got=handle, expected="a handle from 0 to 2**64 - 1")
    return handle


def _handle_of(stream: Any) -> object:
    kind = type(stream)
    if hasattr(kind, "__cuda_stream__"):
        protocol = stream.__cuda_stream__()
        return protocol[1] if isinstance(protocol, tuple) and len(protocol) == 2 else None
    if hasattr(stream, "cuda_stream"):  # torch
        return stream.cuda_stream
    if isinstance(getattr(stream, "ptr", None), int):  # cupy
        return stream.ptr
    if kind.__module__.partition(".")[0] == "cuda" and hasattr(kind, "__int__"):
        return int(stream)
    # numpy's integers; its arrays have __index__ as well, and most refuse it.
    if isinstance(stream, numbers.Integral) and kind is not bool:
        return operator.index(stream)
    return None


def swap(device: Device, handle: int) -> int:
    """Make `handle` this thread's stream on `device`; returns the one it replaces."""
    before = ffi.new("TVMFFIStreamHandle *")
    pointer = ffi.cast("void *", handle)
    check(library.lib.TVMFFIEnvSetStream(device.type_code, device.index, pointer, before), "stream")
    return int(ffi.cast("uintptr_t", before[0]))


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scopes: list[stream] = []
        self.checked: set[tuple[int, int]] = set()  # streams with the devices that they are of


thread = _Thread()
_MOST_CHECKED = 64

# Tells the device of a stream; there once the process is known to have several GPUs.
device_of: Callable[[int], int | None] | None = None


def check_stream(handle: int, device: Device, op: str) -> None:
    """Raise for a stream that is known to be of another GPU than the tensors.

    A kernel that is launched on it would read what is not there, and end the process.
    """
    if device_of is None or handle <= PER_THREAD or not device.is_cuda:
        return
    if (handle, device.index) in thread.checked:
        return
    found = device_of(handle)
    if found is None:
        return
    if found != device.index:
        got, expected = f"a stream of cuda:{found}", f"a stream of {device}"
        raise ArgumentError(op, "stream", got=got, expected=expected)
    if len(thread.checked) >= _MOST_CHECKED:
        thread.checked.clear()
    thread.checked.add((handle, device.index))


class stream:  # a context manager reads as a verb
    """`with fi_ffi.stream(s):` launches every call inside it, on this thread, on `s`.

    Scopes nest; leaving one puts back what was current before.  A scope belongs to
    the device of the first tensors used in it: a stream has one device.

    Raises `ArgumentTypeError` for what is no stream.
    """

    __slots__ = ("_before", "_open", "_source", "device", "handle")

    def __init__(self, stream: object) -> None:
        self.handle = stream_handle(stream)
        self.device: Device | None = None
        self._before = 0
        self._open = threading.Lock()  # held while open: `device` and `_before` are one thread's
        self._source = stream  # keeps a stream object alive while it is current

    def __enter__(self) -> stream:
        if not self._open.acquire(blocking=False):
            raise ArgumentError("stream", "self", got="a scope already open", expected="a new one")
        thread.scopes.append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        scopes = thread.scopes
        if not scopes or scopes[-1] is not self:
            got = "a scope that is not this thread's innermost"
            expected = "scopes closed in the reverse order of opening, on their own thread"
            raise ArgumentError("stream", "self", got=got, expected=expected)
        scopes.pop()
        device, self.device = self.device, None
        try:
            if device is not None:
                swap(device, self._before)
        finally:
            self._open.release()

    def check_device(self, device: Device, op: str) -> None:
        """Raise unless the scope is not yet in use, or in use on `device`."""
        if self.device is not None and self.device is not device:
            got, expected = f"a scope in use on {self.device}", f"a stream of {device}"
            raise ArgumentError(op, "stream", got=got, expected=expected)

    def bind(self, device: Device) -> None:
        """Make this scope's stream current on `device`, once."""
        if self.device is None:
            self._before = swap(device, self.handle)
            self.device = device


def current_scope() -> stream | None:
    """The innermost scope open on this thread."""
    scopes = thread.scopes
    return scopes[-1] if scopes else None


def open_scope(device: Device, op: str) -> stream:
    """The innermost scope open on this thread; raises where none is, or it is another device's."""
    scope = current_scope()
    if scope is None:
        expected = f"{_STREAM}, or an open fi_ffi.stream(...) scope"
        raise ArgumentError(op, "stream", got=None, expected=expected)
    scope.check_device(device, op)
    check_stream(scope.handle, device, op)
    return scope


class launching:
    """The stream of one call: `stream`, or else the open scope's, current on `device`.

    Made before anything is looked up, so that a missing stream is told first.
    """

    __slots__ = ("_before", "_device", "_handle", "_scope")

    def __init__(self, stream: object, device: Device, op: str) -> None:
        self._device, self._scope = device, None
        if stream is None:
            self._scope = open_scope(device, op)
        else:
            self._handle = stream_handle(stream, op)
            check_stream(self._handle, device, op)

    @property
    def handle(self) -> int:
        """The stream's handle."""
        return self._handle if self._scope is None else self._scope.handle

    def __enter__(self) -> None:
        if self._scope is None:
            self._before = swap(self._device, self._handle)
        else:
            self._scope.bind(self._device)

    def __exit__(self, *_: object) -> None:
        if self._scope is None:
            swap(self._device, self._before)
