"""The exception tree.

Every class is also a builtin exception, so that a caller who knows nothing of
fi_ffi still catches what it would expect (`ValueError` for a bad argument,
`RuntimeError` for a kernel that failed).
"""

from __future__ import annotations


class FiFfiError(Exception):
    """Base of every error this package raises on purpose.

    docs/troubleshooting.md has the messages: what each means, and what to do.
    """


class ArgumentError(FiFfiError, ValueError):
    """An argument has the right type and a value that cannot be used.

    Raised before anything is launched or written.  The four fields are what
    the message is made of.
    """

    def __init__(self, op: str, argument: str, *, got: object, expected: object) -> None:
        self.op, self.argument, self.got, self.expected = op, argument, got, expected
        super().__init__(f"{op}: argument `{argument}`: got {_text(got)}, expected {expected}")

    def of(self, op: str, argument: str) -> ArgumentError:
        """The same of an op's argument, which a part of is what this error is about."""
        got = f"{self.argument} {_text(self.got)}"
        return type(self)(op, argument, got=got, expected=self.expected)


_MOST_TEXT = 1000


def _text(value: object) -> str:
    try:
        text = str(value)
    except Exception:  # an int of more digits than Python prints, or the value's own error
        return _unprintable(value)
    if not text:
        return repr(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def printed(value: object, most: int = 60) -> str:
    """The start of a value's repr, for an error: of any value, whatever its repr does."""
    try:
        return repr(value)[:most]
    except Exception:
        return _unprintable(value)


def _unprintable(value: object) -> str:
    why = "too large to print" if isinstance(value, int) else "that cannot be printed"
    return f"a {type(value).__name__} {why}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of a type that cannot be used at all."""


class AbiError(FiFfiError, RuntimeError):
    """A binary does not have the interface that was declared for it."""


class KernelError(FiFfiError, RuntimeError):
    """A kernel entry reported an error of its own.

    `kind` is the kernel's own name for the class of error ("RuntimeError",
    "ValueError", ...), `message` its text, `backtrace` the C++ frames, most
    recent first, and `op` the entry that was called.
    """

    def __init__(self, op: str, kind: str, message: str, backtrace: str = "") -> None:
        self.op, self.kind, self.message, self.backtrace = op, kind, message, backtrace
        text = f"{op}: {kind}: {message}"
        if backtrace.strip():
            text += f"\nbacktrace, most recent frame first:\n{backtrace.rstrip()}"
        super().__init__(text)


class DeviceError(KernelError):
    """The GPU stopped on an error of earlier work: this process can use it no more.

    `op` is the call that noticed, which need not be the one at fault; `kind` is CUDA's name of
    the error, `code` its number.  Every later call fails alike: restart the process.
    """

    def __init__(self, op: str, kind: str, message: str, code: int) -> None:
        self.code = code
        super().__init__(op, kind, message)


class HangError(FiFfiError, TimeoutError):
    """A call did not finish within the time of a `fi_ffi.watchdog`.

    `op` is the one that was called, `report` what is known of the call.
    """

    def __init__(self, op: str, report: str) -> None:
        self.op, self.report = op, report
        super().__init__(report)


class LoaderError(FiFfiError, RuntimeError):
    """A library or a kernel file could not be found, fetched or loaded."""


class KernelNotFoundError(LoaderError, LookupError):
    """No configured source of kernels has the module or the entry asked for."""


class ArchitectureError(LoaderError):
    """A kernel file has no code that the device can run."""


class ArtifactError(LoaderError, ValueError):
    """A file is not what it claims to be: wrong hash, malformed, or unsafe."""


class FetchError(LoaderError, OSError):
    """A pinned file could not be fetched."""


class BuildError(FiFfiError, RuntimeError):
    """`fi-ffi build` could not make the kernels; `log` is the path of its log, if any."""

    def __init__(self, message: str, log: str | None = None) -> None:
        self.log = log
        super().__init__(message if log is None else f"{message}\nFull log: {log}")
