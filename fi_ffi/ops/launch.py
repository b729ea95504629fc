"""The end of a call whose like was checked before: a written frame is called on a stream."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.abi.failure import take_kernel_error, take_raised
from fi_ffi.abi.frame import Frame
from fi_ffi.loader import machine
from fi_ffi.ops import cuda

_MOST_HANDLES = 64


class _Thread(threading.local):
    def __init__(self) -> None:
        # Streams' handles as C has them, of those that this thread has launched on; it has
        # a context for each since.
        self.pointers: dict[int, Any] = {}


_thread = _Thread()


class Preparing:
    """Given for a stream: the call is prepared for that stream (or scopes) instead of made."""

    __slots__ = ("stream",)

    def __init__(self, stream: object) -> None:
        self.stream = stream


class Place:
    """Where an op's calls are made: the device, and what has to be set for them."""

    __slots__ = ("device", "entry", "has_context", "here", "is_cuda", "op", "set_stream")

    def __init__(self, device: Device, op: str, entry: str) -> None:
        self.device, self.is_cuda = device, device.is_cuda
        self.op, self.entry = op, entry  # names: of what callers call, and of what fails
        self.here: Place | None = None
        self.set_stream: Callable[..., int] = functools.partial(
            library.lib.TVMFFIEnvSetStream, device.type_code, device.index
        )
        gpus = machine.device_count() if device.is_cuda else 0
        # Threads need the device's context, which `machine.make_current` gives each once.
        self.has_context = gpus > 0
        # The same place where its device has to be made current first; with one GPU only,
        # that is the current one.
        if gpus > 1:
            self.here = copy.copy(self)


def launch(frame: Frame, place: Place, stream: object) -> None:
    """Call a bound frame on `stream`, or on the open scope's; raises the entry's error."""
    if place.here is not None:
        if stream is not None:
            stream = stream if type(stream) is int else streams.stream_handle(stream, place.op)
            streams.check_stream(stream, place.device, place.op)
        with cuda.current(place.device):
            launch(frame, place.here, stream)
    elif stream is None or not place.is_cuda:
        if place.is_cuda:
            scopes = streams.thread.scopes
            if not scopes or scopes[-1].device is not place.device:
                scope = streams.open_scope(place.device, place.op)
                _give_context(place)
                scope.bind(place.device)
        if frame.invoke():
            raise (take_kernel_error if place.is_cuda else take_raised)(place.entry)
    else:
        pointer = _thread.pointers.get(stream) if type(stream) is int else None
        if pointer is None:
            pointer = _pointer(place, streams.stream_handle(stream, place.op))
        set_stream, before = place.set_stream, frame.before
        set_stream(pointer, before)
        try:
            if frame.invoke():
                raise take_kernel_error(place.entry)
        finally:
            set_stream(before[0], ffi.NULL)


def _give_context(place: Place) -> None:
    if place.has_context:
        machine.make_current(place.device.index)


def _pointer(place: Place, handle: int) -> Any:
    """A stream's handle as C has it, for a thread that gets the device's context with it."""
    _give_context(place)
    pointers = _thread.pointers
    if len(pointers) >= _MOST_HANDLES:
        pointers.clear()
    return pointers.setdefault(handle, ffi.cast("void *", handle))


def _cut_off() -> None:
    """In a forked child of a process that had used a GPU: the next call looks at its place
    again, which refuses it (`machine.refuse_after_fork`)."""
    if machine.is_cut_off():
        _thread.pointers.clear()
        for scope in streams.thread.scopes:
            scope.device = None


# After `machine`'s own, which finds out.
os.register_at_fork(after_in_child=_cut_off)
