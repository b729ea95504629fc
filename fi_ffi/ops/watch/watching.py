"""Whether calls are watched, and logged.

Where no watchdog and no call log is open, a call costs the test of `inboxes` and nothing else;
what is kept of a call otherwise is in `recording`, imported with the first of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import deque

    from fi_ffi.abi.function import Frame
    from fi_ffi.abi.tensor import Device, TensorDesc
    from fi_ffi.ops.watch.logging_calls.log import Log
    from fi_ffi.ops.watch.recording import Call

# One for each open watchdog, told of every call before it is made; and `recording.nobody` while
# a call log is open.
inboxes: tuple[deque[Call], ...] = ()
# The call logs that are open.
logs: tuple[Log, ...] = ()
_NOTHING = contextlib.nullcontext()


def watched(frame: Frame, stream: int | None, call: Callable[[], Any]) -> Any:
    """`call()` of a frame, told to every open watchdog and log, and marked where it is queued
    on a stream.

    The device is current.
    """
    from fi_ffi.ops.watch import recording

    if recording.has_watchdogs():
        call = recording.watched(call, frame, stream)
    for log in logs:
        call = log.logged(call, frame, stream)
    return call()


def called(
    name: str, call: Callable[[], Any], values: Sequence[Any],
    tensors: Sequence[tuple[str, TensorDesc]], device: Device | None,
) -> Any:  # fmt: skip
    """`call()`, of a function that no row describes, told to every open watchdog and log.

    `tensors` are those among the `values`, by the numbers of these.  `device` is that which it
    works on, and current; its stream is this thread's current one.
    """
    from fi_ffi.abi.streams import current_handle as current_stream
    from fi_ffi.ops.watch import recording

    stream = None if device is None or not device.is_cuda else current_stream(device)
    if recording.has_watchdogs():
        call = recording.watched_values(call, name, values, tensors, device, stream)
    for log in logs:
        call = log.logged_values(call, name, values, tensors, device, stream)
    return call()


def running(plan: Any) -> contextlib.AbstractContextManager[None]:
    """Inside the block this thread's calls are a plan's."""
    if not inboxes:
        return _NOTHING
    from fi_ffi.ops.watch import recording

    return recording.running(plan)
