"""The open call logs and the inboxes of open watchdogs, through which calls are made.

While there are any, this module is the watcher of calls (`fi_ffi.ops.call.hooks`).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fi_ffi.abi.function import Frame
from fi_ffi.abi.streams import current_handle as current_stream
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call import hooks as calls
from fi_ffi.ops.call.memory import stream_key
from fi_ffi.watch import stream_progress
from fi_ffi.watch.call_record import CallRecord, of_frame, of_values


class Log(Protocol):
    """An open call log."""

    def around(self, record: CallRecord, call: Callable[[], Any]) -> Any:
        """Make a call and log it; the call's device is current."""

    def note(self, name: str, what: str, device: Device, stream: int | None) -> None:
        """Log an event that is no call of an entry."""

    def continue_in_child(self) -> None:
        """Continue in a forked child."""


Inbox = deque[CallRecord]
# Every inbox gets the record of each call before the call is made; the logs nest around the call.
inboxes: tuple[Inbox, ...] = ()
logs: tuple[Log, ...] = ()
lock = threading.RLock()  # held while they change
# The number of forks that led to this process: a watchdog belongs to one process.
generation = 0


def add(hook: Inbox | Log) -> None:
    """Show a log or an inbox every call of the process from now on."""
    with lock:
        if isinstance(hook, deque):
            _install((*inboxes, hook), logs)
        else:
            _install(inboxes, (*logs, hook))


def remove(hook: Inbox | Log) -> None:
    """Stop showing calls to a log or an inbox."""
    with lock:
        _install(
            tuple(inbox for inbox in inboxes if inbox is not hook),
            tuple(log for log in logs if log is not hook),
        )


def _install(open_inboxes: tuple[Inbox, ...], open_logs: tuple[Log, ...]) -> None:
    """Replace the inboxes and logs, and watch calls if there are any."""
    global inboxes, logs
    inboxes, logs = open_inboxes, open_logs
    calls.watcher = sys.modules[__name__] if inboxes or logs else None


def noted(op: str, words: str, device: Device, stream: int | None) -> None:
    """Write something that is no call into all logs."""
    for log in logs:
        log.note(op, words, device, stream)


def watched(frame: Frame, stream: int | None, call: Callable[[], Any]) -> Any:
    """Make the call of a frame, whose device is current, inside all logs."""
    return _watched(of_frame(frame, stream), call)


def called(
    name: str,
    call: Callable[[], Any],
    values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]],
    device: Device | None,
) -> Any:
    """Make the call of a function without a row, inside all logs."""
    stream = None if device is None or not device.is_cuda else current_stream(device)
    return _watched(of_values(name, values, tensors, device, stream), call)


def _watched(record: CallRecord, call: Callable[[], Any]) -> Any:
    """Make a call, marked for the watchdogs, inside all logs."""
    if inboxes:
        call = functools.partial(_marked, record, call)
    for log in logs:
        call = functools.partial(log.around, record, call)
    return call()


def _marked(record: CallRecord, call: Callable[[], Any]) -> Any:
    """Make a call that every open watchdog records, and mark its stream where its work is queued.

    A stream that is capturing gets no mark: the graph's work is done when the graph is launched,
    which is no call of fi_ffi's.
    """
    deliver(record)
    try:
        stream, device = record.stream, record.device
        if stream is None or device is None or cuda.is_capturing(stream):
            return call()
        # Before the call, because the first cell of a stream may allocate, which can take long.
        progress, key = stream_progress.progress, stream_key(device.index, stream)
        record.cell = progress.cell(key)
        result = call()
        record.cell, record.mark = progress.mark(record.cell, key, stream)
        return result
    finally:
        record.is_ended = record.mark is None


def deliver(record: CallRecord) -> None:
    """Put a call that begins now into the inbox of every open watchdog."""
    record.started = time.monotonic()
    for inbox in inboxes:
        inbox.append(record)


def _continue_in_child() -> None:
    """Keep the parent's logs in a forked child, and drop its watchdogs, whose threads do not exist
    there."""
    global generation, lock
    generation, lock = generation + 1, threading.RLock()
    _install((), logs)
    for log in logs:
        log.continue_in_child()


os.register_at_fork(after_in_child=_continue_in_child)
