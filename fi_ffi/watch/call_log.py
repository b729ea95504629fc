"""`fi_ffi.call_log`: logs every call before it is made, so that the log survives a crash."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelError, let_through, printed
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import INT64_MAX, check_int, shown
from fi_ffi.watch import watching
from fi_ffi.watch.call_record import CallRecord, place_of
from fi_ffi.watch.dump import MAX_BYTES, MAX_CALLS, Dump
from fi_ffi.watch.tensor_bytes import statistics
from fi_ffi.watch.writer import Writer

NAMES, ARGUMENTS, STATISTICS = 1, 3, 5
_LEVELS = (0, NAMES, ARGUMENTS, STATISTICS)
LEVEL, DEST = "FI_FFI_LOG_LEVEL", "FI_FFI_LOG_DEST"
DUMP, DUMP_OPS = "FI_FFI_DUMP_DIR", "FI_FFI_DUMP_OPS"
DUMP_CALLS, DUMP_BYTES = "FI_FFI_DUMP_MAX_CALLS", "FI_FFI_DUMP_MAX_BYTES"
_DEFAULT_DEST = "stderr"
_numbers = itertools.count(1)  # numbers of calls, in log lines and file names of dumps


class call_log:  # a verb, as `open` is
    """Log the calls of all threads, until `close()` or the end of a `with` block.

    Each call is written before it is made, so that a crash of the process leaves it in the log.

    Args:
        level: 1 logs names; 3 also arguments, the place of the call and its return; 5 also
            statistics of the tensors, for which every call waits for its stream; 0 logs nothing
            and is for dumps.
        dest: "stdout", "stderr" or a path to append to, in which `%i` is the process id.
        dump: a directory for dumps: the tensors of each call, before and after it.  `fi-ffi replay`
            repeats such a call.
        dump_ops: names of the ops to dump, with `*` and `?`, separated by commas; empty: all.
        max_dump_calls, max_dump_bytes: limits of the dumps; further calls are logged only.

    The environment variables FI_FFI_LOG_LEVEL, FI_FFI_LOG_DEST, FI_FFI_DUMP_DIR, FI_FFI_DUMP_OPS,
    FI_FFI_DUMP_MAX_CALLS and FI_FFI_DUMP_MAX_BYTES open a log for the life of the process.
    Several logs can be open; each has every call.

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
        max_dump_calls: int = MAX_CALLS,
        max_dump_bytes: int = MAX_BYTES,
    ) -> None:
        _check_level("level", level)
        for name, value in (("max_dump_calls", max_dump_calls), ("max_dump_bytes", max_dump_bytes)):
            check_int("call_log", name, value, 0, INT64_MAX)
        if not isinstance(dump_ops, str):
            got = type(dump_ops).__name__
            raise ArgumentTypeError("call_log", "dump_ops", got=got, expected="str")
        dumped = None if dump is None else Dump(dump, dump_ops, max_dump_calls, max_dump_bytes)
        writer = Writer(dest) if level else None
        self._log: OpenLog | None = OpenLog(level, writer, dumped)
        watching.add(self._log)

    def close(self) -> None:
        """Close the log; closing it again does nothing."""
        log, self._log = self._log, None
        if log is None:
            return
        watching.remove(log)
        log.close()

    def __enter__(self) -> call_log:
        if self._log is None:
            raise ArgumentError("call_log", "self", got="a closed log", expected="a new one")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_level(name: str, level: object) -> None:
    expected = " or ".join(map(str, _LEVELS))
    if type(level) is not int:
        raise ArgumentTypeError("call_log", name, got=shown(level), expected=expected)
    if level not in _LEVELS:
        raise ArgumentError("call_log", name, got=level, expected=expected)


def open_by_environment(environment: Mapping[str, str] = os.environ) -> call_log | None:
    """Open the log that the environment asks for, or return None. An `ArgumentError` names the
    variable."""
    level = _number(environment, LEVEL, 0)
    dump = environment.get(DUMP) or None
    _check_level(LEVEL, level)
    if not level and dump is None:
        return None
    return call_log(
        level,
        environment.get(DEST) or _DEFAULT_DEST,
        dump=dump,
        dump_ops=environment.get(DUMP_OPS, ""),
        max_dump_calls=_number(environment, DUMP_CALLS, MAX_CALLS),
        max_dump_bytes=_number(environment, DUMP_BYTES, MAX_BYTES),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentError("call_log", name, got=printed(text), expected="a number")
    return int(text)


class OpenLog:
    """The actions of an open call log around each call. If one fails, the log says so, and the call
    is made all the same."""

    def __init__(self, level: int, writer: Writer | None, dump: Dump | None) -> None:
        self._level, self._writer, self._dump = level, writer, dump

    def around(self, record: CallRecord, call: Callable[[], Any]) -> Any:
        """Make a call and log it; the call's device is current."""
        number = next(_numbers)
        self._write_entry(number, record.qualname, lambda: self._lines(record), NAMES)
        can_read = self._can_read(number, record)
        dumped = None
        if can_read:
            self._write_statistics(number, record, "before")
            dumped = self._dump_before(number, record)
        start = time.monotonic()
        try:
            result = call()
        except BaseException as error:
            self._write_entry(number, f"raised {_error_text(error)}")
            raise
        self._write_entry(number, f"returned after {(time.monotonic() - start) * 1e6:.0f} us")
        if can_read:
            self._write_statistics(number, record, "after")
        if dumped is not None:
            self._dump_after(number, record, dumped, result)
        return result

    def note(self, name: str, what: str, device: Device, stream: int | None) -> None:
        """Log an event that is no call of an entry: a graph was recorded or is launched."""
        lines = [f"  entry: {what}, on {place_of(device, stream)}"] * (self._level >= ARGUMENTS)
        self._write_entry(next(_numbers), name, lambda: lines, NAMES)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def continue_in_child(self) -> None:
        """Log a forked child's calls, in a new file if the path contains the process's id."""
        if self._dump is not None:
            self._dump.renew()
        if self._writer is not None:
            try:
                self._writer.open()
            except ArgumentError:
                self._writer.close()

    def _lines(self, record: CallRecord) -> Iterator[str]:
        """Return the lines that are logged before a call."""
        if self._level < ARGUMENTS:
            return
        yield f"  called: {record.caller}"
        on = "" if record.device is None else f", on {place_of(record.device, record.stream)}"
        yield f"  entry: {record.entry}{on}"
        yield from (f"  {arg.name}: {arg}" for arg in record.arguments)
        if record.plan is not None:
            yield f"  plan: {record.plan_summary}"

    def _can_read(self, number: int, record: CallRecord) -> bool:
        """Whether the level asks for the tensors' contents, and they can be read now."""
        if self._level < ARGUMENTS and self._dump is None:
            return False
        if record.stream is not None and _is_capturing(record.stream):
            self._write_entry(number, "is recorded into a graph, and not run: nothing is read")
            return False
        return True

    def _write_statistics(self, number: int, record: CallRecord, when: str) -> None:
        """Log statistics of the arguments before a call, or of the results after it."""
        if self._level < STATISTICS:
            return
        tensors = record.tensors("reads" if when == "before" else "writes")

        def lines() -> Iterator[str]:
            for name, tensor in tensors.items():
                try:
                    yield f"  {name}: {statistics(tensor, record.stream)}"
                except Exception as error:
                    yield f"  {name}: no statistics: {_error_text(error)}"

        if tensors:
            self._write_entry(number, f"{when}:", lines)

    def _dump_before(self, number: int, record: CallRecord) -> str | None:
        if self._dump is None:
            return None
        try:
            stem, what = self._dump.before(number, record)
        except Exception as error:
            stem, what = None, f"not dumped: {_error_text(error)}"
        if what:
            self._write_entry(number, what, level=NAMES)
        return stem

    def _dump_after(self, number: int, record: CallRecord, stem: str, result: Any) -> None:
        assert self._dump is not None
        try:
            what = self._dump.after(stem, record, result)
        except Exception as error:
            what = f"results not dumped: {_error_text(error)}"
        self._write_entry(number, what, level=NAMES)

    def _write_entry(
        self,
        number: int,
        what: str,
        lines: Callable[[], Iterable[str]] = tuple,
        level: int = ARGUMENTS,
    ) -> None:
        """Write a head and its lines in one piece, if the log has this level."""
        if self._writer is None or self._level < level:
            return
        now = datetime.now().isoformat(" ", "microseconds")
        head = f"[{now} {os.getpid()}] #{number} {what}"
        try:
            said = [head, *lines()]
        except Exception as error:
            said = [f"{head} cannot be told: {_error_text(error)}"]
        # A message may contain line breaks.
        self._writer.write("".join(line.replace("\n", "\n    ") + "\n" for line in said))


def _error_text(error: BaseException) -> str:
    let_through(error)
    return f"{type(error).__name__}: {error}"


def _is_capturing(stream: int) -> bool:
    try:
        return cuda.is_capturing(stream)
    except KernelError:
        # CUDA refuses the question for the default stream while another stream is capturing.
        return True
