"""What stands around every call while somebody watches: nothing here knows who does.

`fi_ffi.watch` installs itself as `watcher` while a call log or a watchdog is open. Without one
a call costs one test of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fi_ffi.abi.function import Frame
    from fi_ffi.abi.tensor import Device, TensorDesc


class Watcher(Protocol):
    """Makes calls, and shows them to whoever watches."""

    def watched(self, frame: Frame, stream: int | None, call: Callable[[], Any]) -> Any:
        """Make the call of a frame, whose device is current."""

    def called(
        self,
        name: str,
        call: Callable[[], Any],
        values: Sequence[Any],
        tensors: Sequence[tuple[str, TensorDesc]],
        device: Device | None,
    ) -> Any:
        """Make the call of a function without a row.

        `tensors` are the tensors among the `values`, by their numbers. `device` is the call's
        device, which is current; the stream is the thread's current one.
        """

    def noted(self, op: str, words: str, device: Device, stream: int | None) -> None:
        """Take note of something that is no call, such as the launch of a graph."""


watcher: Watcher | None = None


class _Thread(threading.local):
    plan: Any = None


# `plan` is the plan whose calls this thread makes.
thread = _Thread()
_NOTHING = contextlib.nullcontext()


def running(plan: Any) -> contextlib.AbstractContextManager[None]:
    """Have this thread's calls inside the block watched as a plan's."""
    return _NOTHING if watcher is None else _running(plan)


@contextlib.contextmanager
def _running(plan: Any) -> Iterator[None]:
    before, thread.plan = thread.plan, plan
    try:
        yield
    finally:
        thread.plan = before
