"""`fi_ffi.call_log`: writes every call before it is made, so that a crash leaves it behind."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelError, printed
from fi_ffi.ops import cuda
from fi_ffi.ops.call.arguments import INT64_MAX, check_int, shown
from fi_ffi.ops.watch import watching
from fi_ffi.ops.watch.call_record import CallRecord, place_of
from fi_ffi.ops.watch.dump import MOST_BYTES, MOST_CALLS, Dump
from fi_ffi.ops.watch.tensor_bytes import statistics
from fi_ffi.ops.watch.writer import Writer

NAMES, ARGUMENTS, STATISTICS = 1, 3, 5
_LEVELS = (0, NAMES, ARGUMENTS, STATISTICS)
LEVEL, DEST = "FI_FFI_LOG_LEVEL", "FI_FFI_LOG_DEST"
DUMP, DUMP_OPS = "FI_FFI_DUMP_DIR", "FI_FFI_DUMP_OPS"
DUMP_CALLS, DUMP_BYTES = "FI_FFI_DUMP_MAX_CALLS", "FI_FFI_DUMP_MAX_BYTES"
_DEFAULT_DEST = "stderr"
_numbers = itertools.count(1)  # of calls, in heads of lines and in names of dumps


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
        _check_level("level", level)
        for name, value in (("max_dump_calls", max_dump_calls), ("max_dump_bytes", max_dump_bytes)):
            check_int("call_log", name, value, 0, INT64_MAX)
        if not isinstance(dump_ops, str):
            got = type(dump_ops).__name__
            raise ArgumentTypeError("call_log", "dump_ops", got=got, expected="str")
        dumped = None if dump is None else Dump(dump, dump_ops, max_dump_calls, max_dump_bytes)
        writer = Writer(dest) if level else None
        self._log: Log | None = Log(level, writer, dumped)
        watching.add(self._log)
        _rearm_graphs()

    def close(self) -> None:
        """End it; once more does nothing."""
        log, self._log = self._log, None
        if log is None:
            return
        watching.remove(log)
        _rearm_graphs()
        log.close()

    def __enter__(self) -> call_log:
        if self._log is None:
            raise ArgumentError("call_log", "self", got="one that is closed", expected="a new one")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_level(name: str, level: object) -> None:
    expected = " or ".join(map(str, _LEVELS))
    if type(level) is not int:
        raise ArgumentTypeError("call_log", name, got=shown(level), expected=expected)
    if level not in _LEVELS:
        raise ArgumentError("call_log", name, got=level, expected=expected)


def _rearm_graphs() -> None:
    """Have launches of graphs logged, or not any more; where there can be graphs."""
    graphs = sys.modules.get("fi_ffi.ops.graphs")
    if graphs is not None:
        graphs.rearm()


def open_by_environment(environment: Mapping[str, str] = os.environ) -> call_log | None:
    """The log that the environment asks for.  Raises `ArgumentError` naming its variable."""
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
        max_dump_calls=_number(environment, DUMP_CALLS, MOST_CALLS),
        max_dump_bytes=_number(environment, DUMP_BYTES, MOST_BYTES),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentError("call_log", name, got=printed(text), expected="a number")
    return int(text)


class Log:
    """What an open call log does around each call; where a part of it fails, the log says so,
    and the call is made all the same."""

    def __init__(self, level: int, writer: Writer | None, dump: Dump | None) -> None:
        self._level, self._writer, self._dump = level, writer, dump

    def around(self, record: CallRecord, call: Callable[[], Any]) -> Any:
        """Make a call and log it.  Its device is current."""
        number = next(_numbers)
        self._say(number, record.qualname, lambda: self._lines(record), NAMES)
        can_read = self._can_read(number, record)
        dumped = None
        if can_read:
            self._say_statistics(number, record, "before")
            dumped = self._dump_before(number, record)
        start = time.monotonic()
        try:
            result = call()
        except BaseException as error:
            self._say(number, f"raised {_told(error)}")
            raise
        self._say(number, f"returned after {(time.monotonic() - start) * 1e6:.0f} us")
        if can_read:
            self._say_statistics(number, record, "after")
        if dumped is not None:
            self._dump_after(number, record, dumped, result)
        return result

    def note(self, name: str, what: str, device: Device, stream: int | None) -> None:
        """Log what is no call of an entry: a graph was recorded or is launched."""
        lines = [f"  entry: {what}, on {place_of(device, stream)}"] * (self._level >= ARGUMENTS)
        self._say(next(_numbers), name, lambda: lines, NAMES)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def continue_in_child(self) -> None:
        """Log a forked child's calls: in a file of its own, where the path has the process's id."""
        if self._dump is not None:
            self._dump.renew()
        if self._writer is not None:
            try:
                self._writer.open()
            except ArgumentError:
                self._writer.close()

    def _lines(self, record: CallRecord) -> Iterator[str]:
        """What is logged of a call before it is made."""
        if self._level < ARGUMENTS:
            return
        yield f"  called: {record.caller}"
        on = "" if record.device is None else f", on {place_of(record.device, record.stream)}"
        yield f"  entry: {record.entry}{on}"
        yield from (f"  {arg.name}: {arg}" for arg in record.arguments)
        if record.plan is not None:
            yield f"  plan: {record.plan_summary}"

    def _can_read(self, number: int, record: CallRecord) -> bool:
        """Whether tensors are to be read, and can be now."""
        if self._level < ARGUMENTS and self._dump is None:
            return False
        if record.stream is not None and _is_capturing(record.stream):
            self._say(number, "is recorded into a graph, and not run: nothing is read")
            return False
        return True

    def _say_statistics(self, number: int, record: CallRecord, when: str) -> None:
        """Write those of the arguments before a call, or of the results after it."""
        if self._level < STATISTICS:
            return
        tensors = record.tensors("reads" if when == "before" else "writes")

        def lines() -> Iterator[str]:
            for name, tensor in tensors.items():
                try:
                    yield f"  {name}: {statistics(tensor, record.stream)}"
                except Exception as error:
                    yield f"  {name}: no statistics: {_told(error)}"

        if tensors:
            self._say(number, f"{when}:", lines)

    def _dump_before(self, number: int, record: CallRecord) -> str | None:
        if self._dump is None:
            return None
        try:
            stem, what = self._dump.before(number, record)
        except Exception as error:
            stem, what = None, f"not dumped: {_told(error)}"
        if what:
            self._say(number, what, level=NAMES)
        return stem

    def _dump_after(self, number: int, record: CallRecord, stem: str, result: Any) -> None:
        assert self._dump is not None
        try:
            what = self._dump.after(stem, record, result)
        except Exception as error:
            what = f"results not dumped: {_told(error)}"
        self._say(number, what, level=NAMES)

    def _say(
        self, number: int, what: str, lines: Callable[[], Iterable[str]] = tuple,
        level: int = ARGUMENTS,
    ) -> None:  # fmt: skip
        """Write a head and the lines below it in one piece, from a level on."""
        if self._writer is None or self._level < level:
            return
        now = datetime.now().isoformat(" ", "microseconds")
        head = f"[{now} {os.getpid()}] #{number} {what}"
        try:
            said = [head, *lines()]
        except Exception as error:
            said = [f"{head} cannot be told: {_told(error)}"]
        # A message may have lines of its own.
        self._writer.write("".join(line.replace("\n", "\n    ") + "\n" for line in said))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _is_capturing(stream: int) -> bool:
    try:
        return cuda.is_capturing(stream)
    except KernelError:
        # Another stream is, and this is the default one, which waits for it.
        return True
