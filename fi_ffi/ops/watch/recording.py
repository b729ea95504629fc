"""Calls while a watchdog is open: what each of them is, and whether it is over."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fi_ffi.abi.function import Frame
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.ops import cuda
from fi_ffi.ops.call.memory import stream_key
from fi_ffi.ops.watch import marks, watching
from fi_ffi.ops.watch.logging_calls.told import Argument, arguments_of, arguments_of_values

_PACKAGE = str(Path(__file__).parents[1]) + os.sep

# How often this process was forked off another: watchdogs are of one process.
generation = 0
lock = threading.RLock()  # of which watchdogs and call logs are open
# The inbox that stands for the call logs: what is put into it is gone.
nobody: deque[Call] = deque(maxlen=0)


class _Thread(threading.local):
    plan: Any = None


_thread = _Thread()


def _is_ours(frame: FrameType) -> bool:
    # What was compiled from a row is of no file, and no module has its globals.
    return frame.f_code.co_filename.startswith(_PACKAGE) or "__name__" not in frame.f_globals


def caller(frame: FrameType | None) -> tuple[str, str, int, str]:
    """What of fi_ffi's was called, and where in the caller's code: file, line and function."""
    method = ""
    while frame is not None and _is_ours(frame):
        method = frame.f_code.co_name
        frame = frame.f_back
    if frame is None:
        return method, "", 0, ""
    return method, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


class Call:
    """One call of an entry, and how far it has come; written by its own thread only."""

    __slots__ = (
        "arguments", "device", "entry", "file", "function", "is_ended", "line", "method", "name",
        "number", "plan", "plan_generation", "slot", "started", "stream", "thread",
    )  # fmt: skip

    def __init__(
        self, name: str, entry: str, device: Device | None, stream: int | None,
        arguments: Callable[[], list[Argument]],
    ) -> None:  # fmt: skip
        self.name, self.entry, self.device, self.stream = name, entry, device, stream
        self.arguments = arguments
        self.plan = _thread.plan
        self.plan_generation = self.plan._generation if self.plan is not None else 0
        self.thread = threading.current_thread()
        self.method, self.file, self.line, self.function = caller(sys._getframe(1))
        # Where its stream marks how far it is, and the number it will have written there when
        # it has done the call's work; None until that is queued.
        self.slot: marks.Slot | None = None
        self.number: int | None = None
        # It has returned, and there is nothing to wait for.
        self.is_ended = False
        self.started = time.monotonic()

    @property
    def op(self) -> str:
        """What was called, as its caller knows it."""
        if self.plan is not None:
            return str(self.plan.op)
        return self.name

    @property
    def has_returned(self) -> bool:
        return self.is_ended or self.number is not None

    @property
    def left(self) -> int:
        """How many marks its stream is short of it; 0 where its work is done or unmarked."""
        if self.slot is None or self.number is None:
            return 0
        return self.slot.until(self.number)

    @property
    def is_over(self) -> bool:
        """Whether it has returned and its stream has done its work."""
        return self.has_returned and not self.left


def of_frame(frame: Frame, stream: int | None) -> Call:
    """A call of a frame, whose arguments are put into words only for a report."""
    variant, packed = frame.variant, frame.snapshot()
    name = variant.compiled.row.name.partition(".")[0]
    arguments = functools.partial(arguments_of, variant, packed)
    return Call(name, frame.entry.name, variant.device, stream, arguments)


def has_watchdogs() -> bool:
    return any(inbox is not nobody for inbox in watching.inboxes)


def tell(call: Call) -> None:
    for inbox in watching.inboxes:
        inbox.append(call)


def watched(call: Callable[[], Any], frame: Frame, stream: int | None) -> Callable[[], Any]:
    """`call` of a frame, told to every open watchdog, and marked; its device is current."""
    return lambda: _marked(call, of_frame(frame, stream))


def watched_values(
    call: Callable[[], Any], name: str, values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]], device: Device | None, stream: int | None,
) -> Callable[[], Any]:  # fmt: skip
    """`call` of a function that no row describes, likewise."""

    def run() -> Any:
        # Not later: the values may be gone by then, or somebody else's.
        arguments = arguments_of_values(values, tensors)
        return _marked(call, Call(name, name, device, stream, lambda: arguments))

    return run


def _marked(call: Callable[[], Any], made: Call) -> Any:
    """Make a call, told to every open watchdog, and marked where it is queued on a stream.

    A stream that is capturing is left alone: what a graph does is done when the graph is
    launched, which is no call of fi_ffi's.
    """
    tell(made)
    try:
        stream, device = made.stream, made.device
        if stream is None or device is None or cuda.is_capturing(stream):
            return call()
        # Before the call: a first slot may need memory, which can be long in coming.
        board, key = marks.board, stream_key(device.index, stream)
        made.slot = board.slot(key)
        result = call()
        made.slot, made.number = board.mark(made.slot, key, stream)
        return result
    finally:
        made.is_ended = made.number is None


@contextlib.contextmanager
def running(plan: Any) -> Iterator[None]:
    """Inside the block this thread's calls are a plan's."""
    before, _thread.plan = _thread.plan, plan
    try:
        yield
    finally:
        _thread.plan = before


def open_inbox(inbox: deque[Call]) -> None:
    """Put every call of the process into it from now on."""
    with lock:
        watching.inboxes = (*watching.inboxes, inbox)


def close_inbox(inbox: deque[Call]) -> None:
    with lock:
        watching.inboxes = tuple(other for other in watching.inboxes if other is not inbox)


def _forget() -> None:
    """A forked child has none of the parent's watchdogs, nor their threads."""
    global generation, lock
    watching.inboxes, lock = (), threading.RLock()
    generation += 1


os.register_at_fork(after_in_child=_forget)
