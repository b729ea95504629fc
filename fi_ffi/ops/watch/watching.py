"""The list of hooks that every call passes: inboxes of open watchdogs, and open call logs.

Where there is none, a call costs the test of `hooks` and nothing else; what is recorded of a
call otherwise is in `call_record`, imported with the first of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fi_ffi.abi.function import Frame
    from fi_ffi.abi.tensor import Device, TensorDesc
    from fi_ffi.ops.watch.call_log import Log
    from fi_ffi.ops.watch.call_record import CallRecord

# An inbox for each open watchdog, which gets the record of every call before it is made; and
# the open call logs, each of which makes the call inside of what it logs.
hooks: tuple[deque[CallRecord] | Log, ...] = ()
lock = threading.RLock()  # held while `hooks` changes
# How often this process was forked off another: watchdogs are of one process.
generation = 0
_NOTHING = contextlib.nullcontext()


class _Thread(threading.local):
    plan: Any = None


# The plan whose calls this thread makes.
thread = _Thread()


def logs() -> list[Log]:
    """The open call logs."""
    return [hook for hook in hooks if not isinstance(hook, deque)]


def add(hook: deque[CallRecord] | Log) -> None:
    """Let a hook see every call of the process from now on."""
    global hooks
    with lock:
        hooks = (*hooks, hook)


def remove(hook: deque[CallRecord] | Log) -> None:
    """Let a hook see no more calls."""
    global hooks
    with lock:
        hooks = tuple(other for other in hooks if other is not hook)


def watched(frame: Frame, stream: int | None, call: Callable[[], Any]) -> Any:
    """Make the call of a frame, whose device is current, through all hooks."""
    from fi_ffi.ops.watch.call_record import of_frame

    return _hooked(of_frame(frame, stream), call)


def called(
    name: str, call: Callable[[], Any], values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]], device: Device | None,
) -> Any:  # fmt: skip
    """Make the call of a function that no row describes, through all hooks.

    `tensors` are those among the `values`, by the numbers of these.  `device` is that which it
    works on, and current; its stream is this thread's current one.
    """
    from fi_ffi.abi.streams import current_handle as current_stream
    from fi_ffi.ops.watch.call_record import of_values

    stream = None if device is None or not device.is_cuda else current_stream(device)
    return _hooked(of_values(name, values, tensors, device, stream), call)


def _hooked(record: CallRecord, call: Callable[[], Any]) -> Any:
    """Make a call, marked for the watchdogs, inside of what each log does around it."""
    found = hooks
    if any(isinstance(hook, deque) for hook in found):
        from fi_ffi.ops.watch.watchdog import marked

        call = functools.partial(marked, record, call)
    for hook in found:
        if not isinstance(hook, deque):
            call = functools.partial(hook.around, record, call)
    return call()


def running(plan: Any) -> contextlib.AbstractContextManager[None]:
    """Record this thread's calls inside the block as a plan's."""
    return _running(plan) if hooks else _NOTHING


@contextlib.contextmanager
def _running(plan: Any) -> Iterator[None]:
    before, thread.plan = thread.plan, plan
    try:
        yield
    finally:
        thread.plan = before


def _continue_in_child() -> None:
    """Keep a parent's logs in a forked child, which has none of the watchdogs' threads."""
    global generation, hooks, lock
    generation, lock = generation + 1, threading.RLock()
    hooks = tuple(logs())
    for log in logs():
        log.continue_in_child()


os.register_at_fork(after_in_child=_continue_in_child)
