"""`fi_ffi.watchdog`: reports calls that do not finish, from a thread that never calls CUDA.

A report is made from the record of a call and from the numbers that its stream has written to
memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fi_ffi.errors import ArgumentError, ArgumentTypeError, HangError
from fi_ffi.ops.call.arguments import check_flag, check_number
from fi_ffi.watch import watching
from fi_ffi.watch.call_record import CallRecord, place_of
from fi_ffi.watch.stream_progress import ProgressCell
from fi_ffi.watch.writer import print_to

EXIT_STATUS = 124  # exit status after `abort`, as that of timeout(1)
_LEAST_PAUSE, _MAX_PAUSE = 0.001, 0.05  # seconds between two polls of the thread
_FIRST_PAUSE, _LAST_PAUSE = 2e-5, 2e-3  # seconds between two polls at the end of a block
# Seconds to wait for the caller's `on_hang`, or for a stderr that nobody reads: at the end of a
# block, and before `abort` ends the process regardless.
_PATIENCE, _LAST_PATIENCE = 10.0, 60.0
_MAX_BLOCKED = 5  # calls behind a late one that a report lists


class watchdog:  # a context manager reads as a verb
    """`with fi_ffi.watchdog(30.0):` reports calls inside the block that do not finish.

    It watches the calls of all threads.  A call is late if it has not returned for `seconds`, or
    if its stream has made no progress for `seconds`; other work on the stream counts too.  The
    report has the op, its arguments, stream and plan, and the calls that wait behind it.

    The end of the block waits for all these calls.  If one is late, it raises `HangError`.  A
    block that ends with an exception does not wait.

    Args:
        seconds: the limit for a call, and for a stream without progress.
        on_hang: called with the report, a string, on the watchdog's own thread; by default the
            report is written to stderr.
        abort: after the report, write the tracebacks of all threads to stderr and end the process
            with exit status 124.

    `reports` has the reports of the last block.  Watchdogs nest; each sees the calls of all
    threads.  Raises `ArgumentError` and `ArgumentTypeError`.
    """

    __slots__ = ("_watch", "abort", "on_hang", "reports", "seconds")

    def __init__(
        self,
        seconds: float,
        *,
        on_hang: Callable[[str], object] | None = None,
        abort: bool = False,
    ) -> None:
        self.seconds = check_number("watchdog", "seconds", seconds, above=0)
        if on_hang is not None and not callable(on_hang):
            got = type(on_hang).__name__
            raise ArgumentTypeError("watchdog", "on_hang", got=got, expected="a callable or None")
        self.on_hang, self.abort = on_hang, check_flag("watchdog", "abort", abort)
        self.reports: list[str] = []
        self._watch: _Watch | None = None

    def __enter__(self) -> watchdog:
        watch = _Watch(self)
        try:
            with watching.lock:
                if self._watch is not None and self._watch.is_of_this_process:
                    got, expected = "an open watchdog", "a new one, or this one when it is closed"
                    raise ArgumentError("watchdog", "self", got=got, expected=expected)
                self._watch = watch
            self.reports = []
            watch.thread.start()
            watching.add(watch.inbox)
        except BaseException:  # the thread could not be started, or a signal handler raised
            if self._watch is watch:
                self._watch = None
            watching.remove(watch.inbox)
            watch.stop.set()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            raise ArgumentError("watchdog", "self", got="a closed watchdog", expected="an open one")
        if not watch.is_of_this_process:  # a forked child leaves the block of its parent
            return
        hang = None
        try:
            watching.remove(watch.inbox)
            if exc_type is None:
                hang = watch.wait()
        finally:
            watch.close()
            watching.remove(watch.inbox)  # a signal handler may have ended the first try
        if hang is not None:
            raise HangError(hang.call.op, hang.report(self.seconds))


class _Watch:
    """The state of an open watchdog, and its thread."""

    def __init__(self, owner: watchdog) -> None:
        self._owner = owner
        self._generation = watching.generation
        self.inbox: watching.Inbox = deque()
        self._lock = threading.Lock()
        self._pending: list[CallRecord] = []
        # Each stream's last progress, and the time at which it was first seen.
        self._progress: dict[ProgressCell, tuple[int, float]] = {}
        self._reported: set[CallRecord] = set()
        self.stop = threading.Event()
        name = f"fi_ffi.watchdog({owner.seconds:g})"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_of_this_process(self) -> bool:
        return self._generation == watching.generation

    def close(self) -> None:
        """End the thread, after it has reported the calls that are late now."""
        self.stop.set()
        self.thread.join(_PATIENCE)
        if self.thread.is_alive():
            _write_stderr(
                f"fi_ffi.watchdog: a report was not taken within {_PATIENCE:g} s; not waited for"
            )

    def wait(self) -> Hang | None:
        """Wait until every recorded call is over; return the first late one, if any."""
        pause = _FIRST_PAUSE
        while True:
            late = self._poll()
            if late:
                return min(late, key=lambda hang: hang.call.started)
            if not self._pending:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _poll(self) -> list[Hang]:
        """Return the calls that are late now; only reads memory."""
        with self._lock:
            while self.inbox:
                self._pending.append(self.inbox.popleft())
            # Drop finished calls before reading the streams' progress, which then includes them.
            self._pending = [call for call in self._pending if not call.is_over]
            self._reported.intersection_update(self._pending)
            queues: dict[ProgressCell | None, list[CallRecord]] = {}
            for call in self._pending:
                queues.setdefault(call.cell, []).append(call)
            now = time.monotonic()
            before, self._progress = self._progress, {}
            late: list[Hang] = []
            for cell, calls in queues.items():
                late += self._late(cell, calls, before, now)
            return late

    def _late(
        self,
        cell: ProgressCell | None,
        calls: list[CallRecord],
        before: dict[ProgressCell, tuple[int, float]],
        now: float,
    ) -> list[Hang]:
        """Return the late calls among those of one stream, or among those without a stream
        (yet)."""
        # The time of the stream's last progress.
        moved, limit = 0.0, self._owner.seconds
        queued = [call for call in calls if call.mark is not None]
        if cell is not None:
            value = cell.value
            known = before.get(cell, (value, 0.0))
            moved = known[1] if known[0] == value else now
            self._progress[cell] = value, moved
        if queued:
            first = min(queued, key=lambda call: call.left)
            waited = now - max(moved, first.started)
            if waited > limit:
                # The other calls on this stream are probably blocked by this one.
                return [Hang(first, waited, [call for call in calls if call is not first])]
        late = []
        for i, call in enumerate(calls):
            waited = now - call.started
            # If the stream made no progress since this call began, the stream's first call will be
            # late instead.
            if not call.has_returned and waited > limit and (not queued or moved > call.started):
                late.append(Hang(call, waited, calls[i + 1 :] if cell is not None else []))
        return late

    def _run(self) -> None:
        pause = min(max(self._owner.seconds / 10, _LEAST_PAUSE), _MAX_PAUSE)
        is_last = False
        while not is_last:
            is_last = self.stop.wait(pause)
            for hang in self._poll():
                if hang.call not in self._reported:
                    self._reported.add(hang.call)
                    self._report(hang)

    def _report(self, hang: Hang) -> None:
        owner = self._owner
        if owner.abort:
            with contextlib.suppress(RuntimeError):  # the thread cannot be started
                threading.Thread(target=_end_after, args=(_LAST_PATIENCE,), daemon=True).start()
        try:
            text = hang.report(owner.seconds)
            owner.reports.append(text)
            (owner.on_hang or _write_stderr)(text)
        except BaseException:  # an error of the caller's `on_hang`, which nobody here can catch
            _write_stderr(f"fi_ffi.watchdog: the report was not taken:\n{traceback.format_exc()}")
        if owner.abort:
            with contextlib.suppress(Exception):
                faulthandler.dump_traceback(2, all_threads=True)
            os._exit(EXIT_STATUS)


def _write_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        print_to("stderr", f"{text}\n")


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_STATUS)


class Hang(NamedTuple):
    """A late call, the seconds without progress, and the calls made after it."""

    call: CallRecord
    waited: float
    behind: list[CallRecord]

    def report(self, seconds: float) -> str:
        """Return the report, with one fact per line."""
        return "\n".join(self._lines(seconds))

    def _lines(self, seconds: float) -> Iterator[str]:
        call = self.call
        what = "finished, and its stream has not moved" if call.has_returned else "returned"
        yield f"fi_ffi.watchdog({seconds:g}): {call.op} has not {what} for {self.waited:.2f} s"
        yield f"  called: {call.caller}, {time.monotonic() - call.started:.2f} s ago"
        yield f"  entry: {call.entry}, on {place_of(call.device, call.stream)}"
        if call.has_returned:
            yield "  host: the call has returned, its work is queued"
        else:
            yield "  host: the call has not returned"
        yield from (f"  {arg.name}: {arg}" for arg in call.arguments)
        if call.plan is not None:
            yield f"  plan: {call.plan_summary}"
        if call.stream is not None:
            yield from self._lines_behind()

    def _lines_behind(self) -> Iterator[str]:
        calls = self.behind
        if not calls:
            yield "  behind it: no later call"
            return
        counts = ", ".join(
            f"{count} {op}" for op, count in Counter(call.op for call in calls).most_common()
        )
        yield f"  behind it: {len(calls)} later call{'s' if len(calls) > 1 else ''} ({counts})"
        blocked = [call for call in calls if not call.has_returned]
        for call in blocked[:_MAX_BLOCKED]:
            yield f"    not returned: {call.op}, {call.caller}"
        if len(blocked) > _MAX_BLOCKED:
            yield f"    and {len(blocked) - _MAX_BLOCKED} more that have not returned"
