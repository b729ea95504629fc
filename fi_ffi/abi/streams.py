"""CUDA streams: reading stream objects, and the stream that this thread launches on.

libtvm_ffi keeps a current stream for each thread and device, and kernels launch on it. Only this
module, `fi_ffi.ops.call.launch` and `fi_ffi.ops.steps.stream` change it, and all restore it.
"""

from __future__ import annotations

import numbers
import operator
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check
from fi_ffi.abi.tensor import Device, remember
from fi_ffi.errors import ArgumentError, ArgumentTypeError, type_name, with_type

# cudaStreamPerThread. Handles up to it are default streams and belong to the current device.
PER_THREAD = 2
_STREAM = "an int handle, or a cuda.core, cuda-python, cupy or torch stream"


def stream_handle(stream: object, op: str = "stream") -> int:
    """Return a stream's `cudaStream_t` as an int (0 is the legacy default stream).

    Accepts an int, an object with the `__cuda_stream__` protocol (cuda.core), a cuda-python
    `CUstream` or `cudaStream_t`, and a torch or cupy stream.
    """
    kind = type(stream)
    try:
        handle = stream if kind is int else _handle_of(stream)
    # the object refused, for example a destroyed stream: quote its message
    except Exception as error:
        got = f"a {type_name(kind)} that refused: {error}"
        raise ArgumentError(op, "stream", got=got, expected=_STREAM) from error
    if type(handle) is not int:
        raise ArgumentTypeError(op, "stream", got=with_type(stream), expected=_STREAM)
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
    # Integers of numpy. Its arrays have __index__ too, but most of them refuse the call.
    if isinstance(stream, numbers.Integral) and kind is not bool:
        return operator.index(stream)
    return None


def _set(device: Device, stream: Any, before: Any = ffi.NULL) -> None:
    """Make a stream this thread's on `device`; the previous one is written to `before`."""
    check(library.lib.TVMFFIEnvSetStream(device.type_code, device.index, stream, before), "stream")


def swap(device: Device, handle: int) -> int:
    """Make `handle` this thread's stream on `device` and return the previous one."""
    before = ffi.new("TVMFFIStreamHandle *")
    _set(device, ffi.cast("void *", handle), before)
    return library.address_of(before[0])


def current_handle(device: Device) -> int:
    """Return this thread's current stream on `device`."""
    return library.address_of(library.lib.TVMFFIEnvGetStream(device.type_code, device.index))


class _Thread(threading.local):
    def __init__(self) -> None:
        # For each device: the scope whose stream is set on this thread, and a cell with the stream
        # that was current before any scope, `_NOT_YET` before that is set.
        self.scopes: dict[Device, stream] = {}
        self.replaced: dict[Device, Any] = {}
        # Devices of the streams checked so far, by handle.
        self.checked: dict[int, Device] = {}


thread = _Thread()
_NOT_YET = ffi.cast("void *", 2**64 - 1)
_MAX_CHECKED = 64

# Returns the index of a stream's device. Set once the process is known to have several GPUs.
device_of: Callable[[int], int | None] | None = None


def known_device(handle: int) -> int | None:
    """Return the index of a stream's device, if the process has several and CUDA tells it."""
    return None if device_of is None else device_of(handle)


def check_stream(handle: int, device: Device, op: str) -> None:
    """Raise if a stream is known to belong to another GPU than the tensors.

    A kernel launched on it would fault and end the process.
    """
    if device_of is None or handle <= PER_THREAD or not device.is_cuda:
        return
    if thread.checked.get(handle) is device:
        return
    found = device_of(handle)
    if found is None:
        return
    if found != device.index:
        got, expected = f"a stream of cuda:{found}", f"a stream of {device}"
        raise ArgumentError(op, "stream", got=got, expected=expected)
    remember(thread.checked, handle, device, _MAX_CHECKED)


class stream:  # lower case: a context manager reads as a verb
    """Launch every call inside `with fi_ffi.stream(s):` on `s`.

    A scope belongs to the thread or asyncio task that opened it (`contextvars`).  Scopes nest;
    leaving one restores the stream before it.  A scope takes the device of the first tensors used
    in it, because a stream belongs to one device.

    Raises `ArgumentTypeError` for an object that is not a stream.
    """

    __slots__ = ("_open", "_outer", "_source", "_thread", "device", "handle")

    def __init__(self, stream: object) -> None:
        is_plain = type(stream) is int and 0 <= stream < 2**64
        self.handle: int = stream if is_plain else stream_handle(stream)  # type: ignore[assignment]
        self.device: Device | None = None
        self._outer: Any = None
        self._thread = 0
        self._open = threading.Lock()  # held while open
        self._source = stream  # keeps the stream object alive while it is current

    def __enter__(self) -> stream:
        if not self._open.acquire(blocking=False):
            raise ArgumentError("stream", "self", got="a scope already open", expected="a new one")
        self._outer, self._thread = scope_var.get(), threading.get_ident()
        self.device = None
        try:
            scope_var.set(self)
        except BaseException:  # an exception of a signal handler, between the two statements
            scope_var.set(self._outer)
            self._open.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if scope_var.get() is not self:
            got = "a scope that is not the innermost of this thread or task"
            expected = "scopes closed in the reverse order of opening, where they were opened"
            raise ArgumentError("stream", "self", got=got, expected=expected)
        try:
            scope_var.set(self._outer)
        finally:
            try:
                self._put_back()
            finally:
                # The scope now belongs to no thread. A task whose context was copied while the
                # scope was open still sees it, and sets its stream for each call separately.
                self._thread, self.device, self._outer = 0, None, None
                self._open.release()

    def _put_back(self) -> None:
        """Restore the previous stream, if this scope's stream is still the current one."""
        device, outer = self.device, self._outer
        if device is None or thread.scopes.get(device) is not self:
            return
        if outer is not None and outer.device is device and outer._thread == self._thread:
            _set(device, ffi.cast("void *", outer.handle))
            thread.scopes[device] = outer
        else:
            before = thread.replaced[device][0]
            if before != _NOT_YET:
                _set(device, before)
            del thread.scopes[device], thread.replaced[device]

    def make_current(self, device: Device) -> bool:
        """Make this scope's stream current on `device` until another scope replaces it or it ends.

        Returns False on a thread that did not open the scope: nothing would restore the stream
        there.
        """
        self.device = device
        if self._thread != threading.get_ident():
            return False
        if thread.scopes.get(device) is not self:
            cell = thread.replaced.setdefault(device, ffi.new("TVMFFIStreamHandle *", _NOT_YET))
            # before the stream is set: if an exception comes between, it is still restored
            thread.scopes[device] = self
            before = cell if cell[0] == _NOT_YET else ffi.NULL
            _set(device, ffi.cast("void *", self.handle), before)
        return True


# The innermost open scope of this context.
scope_var: ContextVar[stream | None] = ContextVar("fi_ffi.stream", default=None)
current_scope: Callable[[], stream | None] = scope_var.get


def open_scope(device: Device, op: str) -> stream:
    """Return the innermost open scope; raise if there is none or if it is another device's."""
    scope = current_scope()
    if scope is None:
        expected = f"{_STREAM}, or an open fi_ffi.stream(...) scope"
        raise ArgumentError(op, "stream", got=None, expected=expected)
    if scope.device is not None and scope.device is not device:
        got, expected = f"a scope in use on {scope.device}", f"a stream of {device}"
        raise ArgumentError(op, "stream", got=got, expected=expected)
    check_stream(scope.handle, device, op)
    return scope


def handle_for(stream: object, device: Device, op: str) -> int:
    """Return the handle of the stream to launch on: `stream`, or the open scope's; 0 on the CPU,
    where what is no stream is refused all the same."""
    if stream is None:
        return open_scope(device, op).handle if device.is_cuda else 0
    is_plain = type(stream) is int and 0 <= stream < 2**64
    handle: int = stream if is_plain else stream_handle(stream, op)  # type: ignore[assignment]
    if not device.is_cuda:
        return 0
    check_stream(handle, device, op)
    return handle
