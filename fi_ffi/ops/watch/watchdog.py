"""`fi_ffi.watchdog`: tells of calls that do not finish, from a thread that calls no CUDA."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import numbers
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from types import TracebackType

from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError, printed
from fi_ffi.ops.watch import recording
from fi_ffi.ops.watch.hang import Hang, report
from fi_ffi.ops.watch.marks import Slot
from fi_ffi.ops.watch.recording import Call

EXIT_STATUS = 124  # of a process that was ended; as timeout(1) has it
_LEAST_PAUSE, _MOST_PAUSE = 0.001, 0.05  # between two looks of the thread
_FIRST_PAUSE, _LAST_PAUSE = 2e-5, 2e-3  # between two looks at the end of a block
# How long what the caller gave as `on_hang`, or a stderr that nobody reads, is waited for:
# when a block ends, and before the process is ended whatever they do.
_PATIENCE, _LAST_PATIENCE = 10.0, 60.0


class watchdog:  # a context manager reads as a verb
    """`with fi_ffi.watchdog(30.0):` tells of fi_ffi's calls inside it that do not finish.

    Watched are the calls that any thread makes between entry and exit.  One is late when
    for `seconds` it has not returned, or has returned and its stream got no further; time
    that the stream spends on other work counts.  A thread then reports it: the op, the
    arguments, the stream, the plan, and what waits behind it.

    The end of the block waits for all of these calls, at most until one is late: then it
    raises `HangError`.  A block that ends with an exception waits for nothing.

    Args:
        seconds: how long a call may take, or its stream may stand still.
        on_hang: called with the report, a string, on the watchdog's own thread; without
            it the report is written to stderr.
        abort: end the process after the report with exit status 124, the tracebacks of all
            threads written to stderr first.

    `reports` holds what was reported.  Watchdogs nest, and several threads can have one
    each; every one is told of all calls.  Raises `ArgumentError` and `ArgumentTypeError`.
    """

    __slots__ = ("_watch", "abort", "on_hang", "reports", "seconds")

    def __init__(
        self,
        seconds: float,
        *,
        on_hang: Callable[[str], object] | None = None,
        abort: bool = False,
    ) -> None:
        self.seconds = _seconds(seconds)
        if on_hang is not None and not callable(on_hang):
            got = type(on_hang).__name__
            raise ArgumentTypeError("watchdog", "on_hang", got=got, expected="a callable or None")
        if type(abort) is not bool:
            got = type(abort).__name__
            raise ArgumentTypeError("watchdog", "abort", got=got, expected="bool")
        self.on_hang, self.abort = on_hang, abort
        self.reports: list[str] = []
        self._watch: _Watch | None = None

    def __enter__(self) -> watchdog:
        watch = _Watch(self)
        with recording.lock:
            if self._watch is not None and self._watch.is_of_this_process:
                expected = "a new one, or this one when it is closed"
                raise ArgumentError("watchdog", "self", got="one already open", expected=expected)
            self._watch = watch
        self.reports = []
        try:
            watch.open()
        except BaseException:  # no thread could be started, or a signal came
            self._watch = None
            recording.close_inbox(watch.inbox)
            watch.stop.set()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            raise ArgumentError("watchdog", "self", got="one not open", expected="an open one")
        if not watch.is_of_this_process:  # a forked child leaves its parent's block
            return
        hang = None
        try:
            recording.close_inbox(watch.inbox)
            if exc_type is None:
                hang = watch.wait()
        finally:
            watch.close()
        if hang is not None:
            raise HangError(hang.call.op, report(hang, self.seconds))


def _seconds(value: object) -> float:
    expected = "a finite number above 0"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        got = f"{type(value).__name__} {printed(value)}"
        raise ArgumentTypeError("watchdog", "seconds", got=got, expected=expected)
    try:
        seconds = float(value)
    except OverflowError:  # an int
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise ArgumentError("watchdog", "seconds", got=value, expected=expected)
    return seconds


class _Watch:
    """What an open watchdog knows, and its thread."""

    def __init__(self, owner: watchdog) -> None:
        self._owner = owner
        self._generation = recording.generation
        self.inbox: deque[Call] = deque()
        self._lock = threading.Lock()
        self._pending: list[Call] = []
        # Where each stream was at the last look, and when it was first seen there.
        self._progress: dict[Slot, tuple[int, float]] = {}
        self._told: set[Call] = set()
        self.stop = threading.Event()
        name = f"fi_ffi.watchdog({owner.seconds:g})"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_of_this_process(self) -> bool:
        return self._generation == recording.generation

    def open(self) -> None:
        self._thread.start()
        recording.open_inbox(self.inbox)

    def close(self) -> None:
        """End the thread, which tells first of what is late by now."""
        self.stop.set()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _say(f"fi_ffi.watchdog: a report was not taken within {_PATIENCE:g} s; not waited for")

    def wait(self) -> Hang | None:
        """Wait until every call told of is over; or what is late, when one is."""
        pause = _FIRST_PAUSE
        while True:
            late = self._look()
            if late:
                return min(late, key=lambda hang: hang.call.started)
            if not self._pending:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _look(self) -> list[Hang]:
        """The calls that are late now; it reads memory and waits for nothing."""
        with self._lock:
            while self.inbox:
                self._pending.append(self.inbox.popleft())
            # A call is over before its stream moves on, so this look sees that it has moved.
            self._pending = [call for call in self._pending if not call.is_over]
            self._told.intersection_update(self._pending)
            queues: dict[Slot | None, list[Call]] = {}
            for call in self._pending:
                queues.setdefault(call.slot, []).append(call)
            now = time.monotonic()
            before, self._progress = self._progress, {}
            late: list[Hang] = []
            for slot, calls in queues.items():
                late += self._late(slot, calls, before, now)
            return late

    def _late(
        self,
        slot: Slot | None,
        calls: list[Call],
        before: dict[Slot, tuple[int, float]],
        now: float,
    ) -> list[Hang]:
        """Those late of the calls on one stream, or of those that are on none (yet)."""
        # When the stream was last seen to move.
        moved, limit = 0.0, self._owner.seconds
        queued = [call for call in calls if call.number is not None]
        if slot is not None:
            value = slot.value
            known = before.get(slot, (value, 0.0))
            moved = known[1] if known[0] == value else now
            self._progress[slot] = value, moved
        if queued:
            first = min(queued, key=lambda call: call.left)
            waited = now - max(moved, first.started)
            if waited > limit:
                # Whatever has not returned there may well be blocked by this one.
                return [Hang(first, waited, [call for call in calls if call is not first])]
        late = []
        for i, call in enumerate(calls):
            waited = now - call.started
            # Behind a stream that has not moved since, it is that stream's first call that is
            # about to be late.
            if not call.has_returned and waited > limit and (not queued or moved > call.started):
                late.append(Hang(call, waited, calls[i + 1 :] if slot is not None else []))
        return late

    def _run(self) -> None:
        pause = min(max(self._owner.seconds / 10, _LEAST_PAUSE), _MOST_PAUSE)
        is_last = False
        while not is_last:
            is_last = self.stop.wait(pause)
            for hang in self._look():
                if hang.call not in self._told:
                    self._told.add(hang.call)
                    self._tell(hang)

    def _tell(self, hang: Hang) -> None:
        owner = self._owner
        if owner.abort:
            with contextlib.suppress(RuntimeError):  # no thread can be started
                threading.Thread(target=_end_after, args=(_LAST_PATIENCE,), daemon=True).start()
        try:
            text = report(hang, owner.seconds)
            owner.reports.append(text)
            (owner.on_hang or _say)(text)
        except BaseException:  # of the caller's own; there is nobody here to raise it to
            _say(f"fi_ffi.watchdog: the report was not taken:\n{traceback.format_exc()}")
        if owner.abort:
            with contextlib.suppress(Exception):
                faulthandler.dump_traceback(2, all_threads=True)
            os._exit(EXIT_STATUS)


def _say(text: str) -> None:
    """Write to stderr; to the process's own where `sys.stderr` is none or broken."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except Exception:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="replace"))


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_STATUS)
