"""The hooks that calls pass: inboxes of open watchdogs, and open call logs.

With hooks this module is the watcher of calls (`fi_ffi.ops.call.hooks`). `call_record`, which
records calls, is imported with the first hook.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.ops.call import hooks as calls

if TYPE_CHECKING:
    from fi_ffi.abi.function import Frame
    from fi_ffi.abi.tensor import Device, TensorDesc
    from fi_ffi.watch.call_log import Log
    from fi_ffi.watch.call_record import CallRecord

# An inbox for each open watchdog, which gets the record of every call before it is made; and the
# open call logs, which nest around the call.
hooks: tuple[deque[CallRecord] | Log, ...] = ()
lock = threading.RLock()  # held while `hooks` changes
# The number of forks that led to this process: a watchdog belongs to one process.
generation = 0


def logs() -> list[Log]:
    """Return the open call logs."""
    return [hook for hook in hooks if not isinstance(hook, deque)]


def add(hook: deque[CallRecord] | Log) -> None:
    """Show a hook every call of the process from now on."""
    with lock:
        _install((*hooks, hook))


def remove(hook: deque[CallRecord] | Log) -> None:
    """Stop showing calls to a hook."""
    with lock:
        _install(tuple(other for other in hooks if other is not hook))


def _install(chosen: tuple[deque[CallRecord] | Log, ...]) -> None:
    """Replace the hooks, and watch calls if there are any."""
    global hooks
    hooks = chosen
    calls.watcher = sys.modules[__name__] if chosen else None


def noted(op: str, words: str, device: Device, stream: int | None) -> None:
    """Write something that is no call into all logs."""
    for log in logs():
        log.note(op, words, device, stream)


def watched(frame: Frame, stream: int | None, call: Callable[[], Any]) -> Any:
    """Make the call of a frame, whose device is current, through all hooks."""
    from fi_ffi.watch.call_record import of_frame

    return _hooked(of_frame(frame, stream), call)


def called(
    name: str, call: Callable[[], Any], values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]], device: Device | None,
) -> Any:  # fmt: skip
    """Make the call of a function without a row, through all hooks."""
    from fi_ffi.abi.streams import current_handle as current_stream
    from fi_ffi.watch.call_record import of_values

    stream = None if device is None or not device.is_cuda else current_stream(device)
    return _hooked(of_values(name, values, tensors, device, stream), call)


def _hooked(record: CallRecord, call: Callable[[], Any]) -> Any:
    """Make a call, marked for the watchdogs, inside all logs."""
    found = hooks
    if any(isinstance(hook, deque) for hook in found):
        from fi_ffi.watch.watchdog import marked

        call = functools.partial(marked, record, call)
    for hook in found:
        if not isinstance(hook, deque):
            call = functools.partial(hook.around, record, call)
    return call()


def _continue_in_child() -> None:
    """Keep the parent's logs in a forked child, and drop its watchdogs, whose threads do not exist
    there."""
    global generation, lock
    generation, lock = generation + 1, threading.RLock()
    _install(tuple(logs()))
    for log in logs():
        log.continue_in_child()


os.register_at_fork(after_in_child=_continue_in_child)
