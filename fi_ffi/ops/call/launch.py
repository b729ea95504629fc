"""The end of every call: calls a written frame on a stream."""

from __future__ import annotations

import functools
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fi_ffi.abi import library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import take_kernel_error, take_raised
from fi_ffi.abi.function import NO_STREAM, Frame
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda, hooks

if TYPE_CHECKING:
    from fi_ffi.abi.streams import stream as Scope

_MAX_HANDLES = 64
_scope = streams.scope_var.get


class _Thread(threading.local):
    def __init__(self) -> None:
        # For each GPU, C pointers of its streams on which this thread has launched, by handle. The
        # thread has the GPU's context then, and the streams are known to be the GPU's.
        self.pointers = defaultdict[int, dict[int, Any]](dict)


_thread = _Thread()


class LaunchTarget:
    """The device on which calls are made, and the function that sets its stream."""

    __slots__ = ("device", "get_device", "index", "is_cuda", "op", "set_none", "set_stream")

    def __init__(self, device: Device, op: str, is_guarded: bool) -> None:
        self.device, self.index, self.is_cuda, self.op = device, device.index, device.is_cuda, op
        self.set_stream: Callable[..., int] = functools.partial(
            library.lib.TVMFFIEnvSetStream, device.type_code, device.index
        )
        # Nearly always no stream was current before a call.
        self.set_none: Callable[[], int] = functools.partial(self.set_stream, ffi.NULL, ffi.NULL)
        # Writes the thread's current device. None where nobody has to ask: for a single GPU, which
        # is always current, and for entries that have a guard of their own.
        self.get_device: Callable[[Any], int] | None = None
        if device.is_cuda and not is_guarded and machine.device_count() > 1:
            self.get_device = machine.load_cudart()[0].cudaGetDevice


def launch(frame: Frame, stream: object, is_watched: bool = False) -> None:
    """Call a frame on `stream`, or on the open scope's; raise the entry's error.

    The frame's device is current during the call, and the caller's again after it, as is the
    stream. The entry's result is left in the frame. A watcher sees the call, unless it `is_watched`
    already.
    """
    target: LaunchTarget = frame.target
    watcher = hooks.watcher
    if watcher is not None and not is_watched:
        _launch_watched(frame, target, stream, watcher)
    elif not target.is_cuda:
        if stream is not None:
            streams.handle_for(stream, target.device, target.op)
        if frame.invoke():
            raise _error_of(frame)
    elif target.get_device is not None and (
        target.get_device(frame.device) or frame.words[frame.device_word] != target.index
    ):
        with cuda.current(target.device):
            launch(frame, stream, is_watched)
    elif stream is not None:
        pointer = _thread.pointers[target.index].get(stream) if type(stream) is int else None
        if pointer is None:
            pointer = _pointer(target, streams.handle_for(stream, target.device, target.op))
        if frame.pointer is not pointer:
            frame.set_stream = functools.partial(target.set_stream, pointer, frame.before)
            frame.pointer = pointer
        words, word = frame.words, frame.before_word
        try:
            code = frame.set_stream() or frame.invoke()
        finally:
            before = words[word]
            if before != NO_STREAM:
                if before:
                    target.set_stream(frame.before[0], ffi.NULL)
                else:
                    target.set_none()
                words[word] = NO_STREAM
        if code:
            raise _error_of(frame)
    else:
        scope = _scope()
        if scope is not None and streams.thread.scopes.get(target.device) is scope:
            if frame.invoke():
                raise _error_of(frame)
        else:
            _launch_in_scope(frame, target)


def _launch_in_scope(frame: Frame, target: LaunchTarget) -> None:
    """Make the first call in a scope, or a call on another thread than the scope's."""
    scope: Scope = streams.open_scope(target.device, target.op)
    if scope.handle not in _thread.pointers[target.index]:
        _pointer(target, scope.handle)  # the thread has the device's context then
    if not scope.make_current(target.device):
        launch(frame, scope.handle, is_watched=True)
    elif frame.invoke():
        raise _error_of(frame)


def _launch_watched(
    frame: Frame, target: LaunchTarget, stream: object, watcher: hooks.Watcher
) -> None:
    """Have a call made by who watches, with its device current."""
    handle = streams.handle_for(stream, target.device, target.op)

    def call() -> Any:
        launch(frame, stream, is_watched=True)
        return frame.peek_result()

    with cuda.current(target.device):
        watcher.watched(frame, handle if target.is_cuda else None, call)


def _error_of(frame: Frame) -> BaseException:
    """Return the error that the entry left; drop any result."""
    frame.drop_result()
    if frame.target.is_cuda:
        return take_kernel_error(frame.entry.name)
    error = take_raised(frame.entry.name)
    if isinstance(error, ArgumentError) and not error.op:  # of a kernel that serves several ops
        refuse = frame.variant.compiled.refuse
        return refuse.error(error.argument, error.got, error.expected)  # type: ignore[no-any-return]
    return error


def _pointer(target: LaunchTarget, handle: int) -> Any:
    """Return a stream's handle as a C pointer; the thread has the device's context then."""
    with cuda.current(target.device):  # of an entry that has a guard it need not be current before
        pass
    pointers = _thread.pointers[target.index]
    if len(pointers) >= _MAX_HANDLES:
        pointers.clear()
    return pointers.setdefault(handle, ffi.cast("void *", handle))


def _forget_streams_after_fork() -> None:
    """Make the next call in a forked child check its device again: `machine.refuse_after_fork`
    refuses if the parent had used a GPU."""
    if machine.forked_after_cuda():
        _thread.pointers.clear()
        streams.thread.scopes.clear()
        streams.thread.replaced.clear()


# Registered after `machine`'s handler, which determines whether the GPU is usable.
os.register_at_fork(after_in_child=_forget_streams_after_fork)
