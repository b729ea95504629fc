"""An open call log: what it does before and after each call."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fi_ffi.abi.function import Frame
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.errors import KernelError
from fi_ffi.ops import cuda
from fi_ffi.ops.watch.hang import caller_of, caller_words, plan_of
from fi_ffi.ops.watch.logging_calls.dump import Dump
from fi_ffi.ops.watch.logging_calls.statistics import statistics
from fi_ffi.ops.watch.logging_calls.told import Told, arguments_of_values
from fi_ffi.ops.watch.logging_calls.words import ARGUMENTS, NAMES, STATISTICS, head, lines
from fi_ffi.ops.watch.logging_calls.writer import Writer
from fi_ffi.ops.watch.recording import Call, caller, of_frame

_numbers = itertools.count(1)


class Log:
    """Tells calls to a writer and a dump; what fails in that is said, and no call fails by it."""

    def __init__(self, level: int, writer: Writer | None, dump: Dump | None) -> None:
        self.level, self.writer, self.dump = level, writer, dump

    def logged(
        self, call: Callable[[], Any], frame: Frame, stream: int | None
    ) -> Callable[[], Any]:
        """`call` of a frame, told.  The device is current."""

        def run() -> Any:
            made, compiled = of_frame(frame, stream), frame.variant.compiled
            told = Told(
                next(_numbers), _name(made), made.entry, made.device, stream, made.arguments(),
                compiled.row, compiled.module, made.plan, caller_of(made), _plan(made),
            )  # fmt: skip
            return self._around(told, call)

        return run

    def logged_values(
        self, call: Callable[[], Any], name: str, values: Sequence[Any],
        tensors: Sequence[tuple[str, TensorDesc]], device: Device | None, stream: int | None,
    ) -> Callable[[], Any]:  # fmt: skip
        """`call` of a function that no row describes, told."""

        def run() -> Any:
            _, file, line, function = caller(sys._getframe(1))
            where = caller_words(file, line, function, threading.current_thread().name)
            arguments = arguments_of_values(values, tensors)
            told = Told(next(_numbers), name, name, device, stream, arguments, caller=where)
            return self._around(told, call)

        return run

    def tell(self, name: str, device: Device, stream: int | None, what: str) -> None:
        """Tell what is no call of an entry: a graph was recorded or is launched."""
        told = Told(next(_numbers), name, what, device, stream, [])
        self._say(told, lambda: lines(told, self.level))

    def _around(self, told: Told, call: Callable[[], Any]) -> Any:
        self._say(told, lambda: lines(told, self.level))
        can_read = self._before(told)
        stem = self._dump_before(told) if can_read else None
        start = time.monotonic()
        try:
            result = call()
        except BaseException as error:
            self._note(told, ARGUMENTS, f"raised {type(error).__name__}: {error}")
            raise
        self._note(told, ARGUMENTS, f"returned after {(time.monotonic() - start) * 1e6:.0f} us")
        if can_read and self.level >= STATISTICS:
            self._say(told, lambda: _statistics(told, "after"))
        if stem is not None:
            self._dump_after(told, stem, result)
        return result

    def _before(self, told: Told) -> bool:
        """Tell the arguments' statistics; whether tensors can be read now."""
        if self.level < ARGUMENTS and self.dump is None:
            return False
        if told.stream is not None and _is_capturing(told.stream):
            self._note(told, ARGUMENTS, "is recorded into a graph, and not run: nothing is read")
            return False
        if self.level >= STATISTICS:
            self._say(told, lambda: _statistics(told, "before"))
        return True

    def _dump_before(self, told: Told) -> str | None:
        if self.dump is None:
            return None
        try:
            stem, what = self.dump.before(told)
        except Exception as error:
            stem, what = None, f"not dumped: {type(error).__name__}: {error}"
        self._note(told, NAMES, what)
        return stem

    def _dump_after(self, told: Told, stem: str, result: Any) -> None:
        assert self.dump is not None
        try:
            what = self.dump.after(stem, told, result)
        except Exception as error:
            what = f"results not dumped: {type(error).__name__}: {error}"
        self._note(told, NAMES, what)

    def _note(self, told: Told, level: int, what: str) -> None:
        if what and self.level >= level:
            self._say(told, lambda: [head(told, what)])

    def _say(self, told: Told, make: Callable[[], Iterable[str]]) -> None:
        if not self.level or self.writer is None:
            return
        try:
            said = [*make()]
        except Exception as error:
            said = [f"{head(told, told.name)} cannot be told: {type(error).__name__}: {error}"]
        if said:
            # A message may have lines of its own.
            self.writer.write("".join(line.replace("\n", "\n    ") + "\n" for line in said))


def _is_capturing(stream: int) -> bool:
    try:
        return cuda.is_capturing(stream)
    except KernelError:
        # Another stream is, and this is the default one, which waits for it.
        return True


def _statistics(told: Told, when: str) -> Iterator[str]:
    """Of the arguments before a call, or the results after it."""
    wanted = [
        arg
        for arg in told.tensors
        if not arg.is_scratch and (arg.reads if when == "before" else arg.writes)
    ]
    if wanted:
        yield head(told, f"{when}:")
    for arg in wanted:
        try:
            yield f"  {arg.name}: {statistics(arg, told.stream)}"
        except Exception as error:
            yield f"  {arg.name}: no statistics: {type(error).__name__}: {error}"


def _name(call: Call) -> str:
    """What was called, as its caller knows it."""
    if call.plan is None:
        return call.op
    kind, method = type(call.plan).__name__, call.method
    # Of prepared runs, which are called, the plan itself is no name.
    return kind if method == "__init__" else f"{kind}.{method.strip('_')}"


def _plan(call: Call) -> str:
    if call.plan is None:
        return ""
    try:
        return plan_of(call)
    except Exception as error:  # it is being made
        return f"a {type(call.plan).__name__} that cannot be told: {error!r}"
