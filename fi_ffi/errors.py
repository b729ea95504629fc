"""Exception classes of fi_ffi.

Every class is also a builtin exception, so that a caller who does not know fi_ffi still catches the
expected type (`ValueError` for a bad argument, `RuntimeError` for a failed kernel).
"""

from __future__ import annotations

import signal
import sys
import threading
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any


class FiFfiError(Exception):
    """Base class of every error that fi_ffi raises on purpose.

    docs/troubleshooting.md explains the messages. None takes the place of an exception of a signal
    handler: if fi_ffi has caught one, making the error raises it again.
    """

    def __init__(self, *args: object) -> None:
        let_through(sys.exc_info()[1])
        super().__init__(*args)


class ArgumentError(FiFfiError, ValueError):
    """An argument has the right type and an unusable value.

    Raised before anything is launched or written.  `op`, `argument`, `got` and `expected` are the
    parts of the message.
    """

    # Raised by a numpy kernel about its own call, which raises it unchanged.
    is_of_kernel = False

    def __init__(self, op: str, argument: str, *, got: object, expected: object) -> None:
        self.op, self.argument, self.got, self.expected = op, argument, got, expected
        super().__init__(f"{op}: argument `{argument}`: got {_text(got)}, expected {expected}")

    def of(self, op: str, argument: str) -> ArgumentError:
        """Return the same error for an op's argument of which this error describes a part."""
        got = f"{self.argument} {_text(self.got)}"
        return type(self)(op, argument, got=got, expected=self.expected)


_MOST_TEXT = 1000
_NEAREST = 5


def _text(value: object) -> str:
    try:
        text = str(value)
    # an int with more digits than Python prints, or an error of the value's own `__str__`
    except Exception as error:
        let_through(error)
        return _unprintable(value)
    if not text:
        return repr(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def with_type(value: object) -> str:
    """Return a value and its type for an error message, as in `str 'a'`; `None` alone."""
    return "None" if value is None else f"{type_name(type(value))} {printed(value)}"


def type_name(kind: type) -> str:
    """Return a type's name with its module, unless Python has it built in."""
    module, name = kind.__module__, kind.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def printed(value: object, most: int = 60) -> str:
    """Return the start of a value's repr for an error message, even if the repr raises."""
    try:
        return repr(value)[:most]
    except Exception as error:
        let_through(error)
        return _unprintable(value)


# A subclass may override the attribute.
_frames_of: Any = BaseException.__dict__["__traceback__"].__get__


def signal_of(error: BaseException) -> int:
    """Return the signal whose handler raised an exception; 0 if none did."""
    frames = _frames_of(error)
    # Python runs signal handlers on the main thread only.
    if frames is None or threading.get_ident() != threading.main_thread().ident:
        return 0
    handlers = dict(_handler_codes())
    while handlers and frames is not None:
        if frames.tb_frame.f_code in handlers:
            return handlers[frames.tb_frame.f_code]
        frames = frames.tb_next
    return 0


def _handler_codes() -> Iterator[tuple[types.CodeType, int]]:
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            function = getattr(handler, "func", handler)  # unwraps functools.partial
            for made in (function, type(function).__call__):
                if isinstance(code := getattr(made, "__code__", None), types.CodeType):
                    yield code, number


def let_through(error: BaseException | None, is_replaced: bool = False) -> None:
    """Raise an exception again if a signal handler raised it, and not what was called.

    With `is_replaced`, do so for one in whose place another was raised. One that a caller of fi_ffi
    has caught is the caller's.
    """
    # No cycle of references may keep the memory of calls, not of this frame, nor of contexts.
    try:
        while error is not None and (not signal_of(error) or _is_callers(error)):
            error = error.__context__ if is_replaced else None
        if error is not None:
            before = error.__context__
            try:
                raise error
            finally:
                error.__context__ = before
    finally:
        error = before = None


def _is_callers(error: BaseException) -> bool:
    """Return whether a function on the stack, not one of fi_ffi, has caught an exception."""
    caught_in, frame = _frames_of(error).tb_frame, sys._getframe(2)
    if caught_in.f_globals.get("__name__", "").startswith("fi_ffi"):
        return False
    while frame.f_back is not None and frame is not caught_in:
        frame = frame.f_back
    return frame is caught_in


def printable(text: str) -> str:
    """Escape the characters of a text that would control a terminal.

    Names of files, symbols, members and arguments come from outside and may contain such
    characters.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `; the nearest: …` with similar known names; "" if there are none.

    A name of which another is the beginning comes first.
    """
    from difflib import get_close_matches  # imported here: only errors need it

    every = sorted({*known})
    longer = [one for one in every if one.startswith(f"{name}_") or name.startswith(f"{one}_")]
    near = dict.fromkeys([*longer, *get_close_matches(name, every, _NEAREST, cutoff)])
    return f"; the nearest: {', '.join([*near][:_NEAREST])}" if near else ""


def _unprintable(value: object) -> str:
    why = "too large to print" if isinstance(value, int) else "that cannot be printed"
    return f"a {type(value).__name__} {why}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a type that cannot be used."""


class AbiError(FiFfiError, RuntimeError):
    """A binary's interface differs from the declared one."""


class KernelError(FiFfiError, RuntimeError):
    """A kernel's entry reported an error.

    `kind` is the kernel's name for the class of error ("RuntimeError", "ValueError", ...),
    `message` its text, `backtrace` the C++ frames, most recent first, and `op` the called entry.
    """

    def __init__(self, op: str, kind: str, message: str, backtrace: str = "") -> None:
        self.op, self.kind, self.message, self.backtrace = op, kind, message, backtrace
        text = f"{op}: {kind}: {message}"
        if backtrace.strip():
            text += f"\nbacktrace, most recent frame first:\n{backtrace.rstrip()}"
        super().__init__(text)


class DeviceError(KernelError):
    """An error of earlier work stopped the GPU, and this process can no longer use it.

    `op` is the call that noticed, which need not be the faulty one; `kind` is CUDA's name of the
    error, `code` its number.  Every later call fails too: restart the process.
    """

    def __init__(self, op: str, kind: str, message: str, code: int) -> None:
        self.code = code
        super().__init__(op, kind, message)


class HangError(FiFfiError, TimeoutError):
    """A call did not finish within the time of a `fi_ffi.watchdog`, or a rank did not arrive.

    `op` is the call, `report` the description of it.
    """

    def __init__(self, op: str, report: str) -> None:
        self.op, self.report = op, report
        super().__init__(report)


class LoaderError(FiFfiError, RuntimeError):
    """A library or kernel file could not be found, fetched or loaded."""


class KernelNotFoundError(LoaderError, LookupError):
    """No source of kernels has the requested module or entry."""


class ArchitectureError(LoaderError):
    """A kernel file has no code that the device can run."""


class ArtifactError(LoaderError, ValueError):
    """A file is not what it claims to be: wrong hash, malformed or unsafe."""


class FetchError(LoaderError, OSError):
    """A pinned file could not be fetched."""


class BuildError(FiFfiError, RuntimeError):
    """`fi-ffi build` could not build the kernels; `log` is the path of its log, or None, and
    `message` the text without it."""

    def __init__(self, message: str, log: str | None = None) -> None:
        self.message, self.log = message, log
        super().__init__(message if log is None else f"{message}\nFull log: {log}")
