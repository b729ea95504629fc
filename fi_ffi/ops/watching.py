"""Whether calls are watched.

Where no watchdog is open, a call costs the test of `inboxes` and nothing else; what is kept
of a call otherwise is in `recording`, imported with the first watchdog.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import deque

    from fi_ffi.abi.device import Device
    from fi_ffi.abi.frame import Slot
    from fi_ffi.abi.function import Entry
    from fi_ffi.ops.recording import Call
    from fi_ffi.ops.row import Row

    Launch = Callable[[Entry, Sequence[Any]], Any]

# One for each open watchdog, told of every call before it is made.
inboxes: tuple[deque[Call], ...] = ()
_NOTHING = contextlib.nullcontext()


def watched(
    call: Launch, row: Row, device: Device, stream: int | None, args: Sequence[Slot]
) -> Launch:
    """`call`, told to every open watchdog, and marked where it is queued on a stream.

    `device` is current.
    """
    from fi_ffi.ops import recording

    return recording.watched(call, row, device, stream, args)


def running(plan: Any) -> contextlib.AbstractContextManager[None]:
    """Inside the block this thread's calls are a plan's."""
    if not inboxes:
        return _NOTHING
    from fi_ffi.ops import recording

    return recording.running(plan)
