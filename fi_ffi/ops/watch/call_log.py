"""`fi_ffi.call_log`: tells of every call before it is made, so that a crash leaves it behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import TracebackType

from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops.watch import recording, watching
from fi_ffi.ops.watch.logging_calls.dump import MOST_BYTES, MOST_CALLS, Dump
from fi_ffi.ops.watch.logging_calls.log import Log
from fi_ffi.ops.watch.logging_calls.words import LEVELS, NAMES
from fi_ffi.ops.watch.logging_calls.writer import Writer

LEVEL, DEST = "FI_FFI_LOG_LEVEL", "FI_FFI_LOG_DEST"
DUMP, DUMP_OPS = "FI_FFI_DUMP_DIR", "FI_FFI_DUMP_OPS"
DUMP_CALLS, DUMP_BYTES = "FI_FFI_DUMP_MAX_CALLS", "FI_FFI_DUMP_MAX_BYTES"
_DEFAULT_DEST = "stderr"


class call_log:  # a verb, as `open` is
    """Log fi_ffi's calls from now on: all of them, whatever thread makes them.

    Each is written before it is made, and at once, so that a crash of the process leaves it in
    the log.  It ends with `close()`, or at the end of a `with` block:

        with fi_ffi.call_log(3, "calls-%i.log"):
            fi_ffi.rmsnorm(out, x, weight, stream=stream)

    Args:
        level: 1 for names; 3 for all arguments, where the call was made, and its return; 5 for
            statistics of the tensors too, for which every call waits for its stream; 0 for
            nothing but dumps.
        dest: "stdout", "stderr" or a path to append to, in which `%i` is the process's id.
        dump: a directory, where each call is written with its tensors, before it is made and
            after: `fi-ffi replay` makes it again.
        dump_ops: patterns of the names that are dumped, with commas between; all, where empty.
        max_dump_calls, max_dump_bytes: what is beyond is logged and not dumped.

    The environment variables FI_FFI_LOG_LEVEL, FI_FFI_LOG_DEST and FI_FFI_DUMP_DIR (and
    FI_FFI_DUMP_OPS, _MAX_CALLS, _MAX_BYTES) open one for the life of the process.  Several can
    be open, and each is told of every call.

    Raises `ArgumentError` and `ArgumentTypeError`.
    """

    __slots__ = ("_log",)

    def __init__(
        self,
        level: int = NAMES,
        dest: str | os.PathLike[str] = _DEFAULT_DEST,
        *,
        dump: str | os.PathLike[str] | None = None,
        dump_ops: str = "",
        max_dump_calls: int = MOST_CALLS,
        max_dump_bytes: int = MOST_BYTES,
    ) -> None:
        _check_level(level)
        for name, value in (("max_dump_calls", max_dump_calls), ("max_dump_bytes", max_dump_bytes)):
            _check_count(name, value)
        if not isinstance(dump_ops, str):
            got = type(dump_ops).__name__
            raise ArgumentTypeError("call_log", "dump_ops", got=got, expected="str")
        dumped = None if dump is None else Dump(dump, dump_ops, max_dump_calls, max_dump_bytes)
        writer = Writer(dest) if level else None
        self._log: Log | None = Log(level, writer, dumped)
        _change((*watching.logs, self._log))

    def close(self) -> None:
        """End it; once more does nothing."""
        log, self._log = self._log, None
        if log is None:
            return
        _change(tuple(other for other in watching.logs if other is not log))
        if log.writer is not None:
            log.writer.close()

    def __enter__(self) -> call_log:
        if self._log is None:
            raise ArgumentError("call_log", "self", got="one that is closed", expected="a new one")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _check_level(level: object) -> None:
    expected = " or ".join(map(str, LEVELS))
    if type(level) is not int:
        got = f"{type(level).__name__} {printed(level)}"
        raise ArgumentTypeError("call_log", "level", got=got, expected=expected)
    if level not in LEVELS:
        raise ArgumentError("call_log", "level", got=level, expected=expected)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int:
        got = f"{type(value).__name__} {printed(value)}"
        raise ArgumentTypeError("call_log", name, got=got, expected="int")
    if value < 0:
        raise ArgumentError("call_log", name, got=value, expected="0 or more")


def _change(logs: tuple[Log, ...]) -> None:
    with recording.lock:
        before, watching.logs = watching.logs, logs
        if logs and not before:
            recording.open_inbox(recording.nobody)
        elif before and not logs:
            recording.close_inbox(recording.nobody)
    graphs = sys.modules.get("fi_ffi.ops.graphs")
    if graphs is not None:
        graphs.rearm()


def open_by_environment(environment: Mapping[str, str] = os.environ) -> call_log | None:
    """The log that the environment asks for.  Raises `ArgumentError` naming its variable."""
    level = _number(environment, LEVEL, 0)
    dump = environment.get(DUMP) or None
    if level not in LEVELS:
        raise ArgumentError("call_log", LEVEL, got=level, expected=" or ".join(map(str, LEVELS)))
    if not level and dump is None:
        return None
    return call_log(
        level,
        environment.get(DEST) or _DEFAULT_DEST,
        dump=dump,
        dump_ops=environment.get(DUMP_OPS, ""),
        max_dump_calls=_number(environment, DUMP_CALLS, MOST_CALLS),
        max_dump_bytes=_number(environment, DUMP_BYTES, MOST_BYTES),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentError("call_log", name, got=printed(text), expected="a number")
    return int(text)


def _continue_in_child() -> None:
    """A forked child's calls are logged as its parent's are: in a file of its own, where the
    path has the process's id."""
    if not watching.logs:
        return
    recording.open_inbox(recording.nobody)
    for log in watching.logs:
        if log.dump is not None:
            log.dump.renew()
        if log.writer is not None:
            try:
                log.writer.open()
            except ArgumentError:
                log.writer.close()


# After `recording`'s own, which forgets all inboxes.
os.register_at_fork(after_in_child=_continue_in_child)
