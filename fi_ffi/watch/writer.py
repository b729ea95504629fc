"""Writes the lines of logs and reports without buffering, so that they outlive the process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from fi_ffi.errors import ArgumentError, ArgumentTypeError, let_through

PROCESS_ID = "%i"  # placeholder in a path


class Writer:
    """Writes whole lines to stdout, stderr or the end of a file, each call's lines in one piece.

    When `write` returns, the operating system has the text: a crash of the process does not lose
    it, but a crash of the machine may.
    """

    def __init__(self, dest: str | os.PathLike[str]) -> None:
        self.dest = _checked(dest)
        self._lock = threading.RLock()
        self._file: int | None = None
        self._said = False
        self.open()

    @property
    def path(self) -> str | None:
        """The file's path; None for stdout and stderr."""
        if self.dest in ("stdout", "stderr"):
            return None
        return self.dest.replace(PROCESS_ID, str(os.getpid()))

    def open(self) -> None:
        """Open the file, if it is one; the path of a forked child may differ."""
        self._lock = threading.RLock()  # another thread may have held the old one at the fork
        path = self.path
        if path is None:
            return
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except (OSError, ValueError) as error:
            expected = f"stdout, stderr, or a file that can be written: {error}"
            raise ArgumentError("call_log", "dest", got=path, expected=expected) from error
        self.close()
        self._file = file

    def close(self) -> None:
        with self._lock:  # so that nothing is written to the next file with this number
            file, self._file = self._file, None
            if file is not None:
                os.close(file)

    def write(self, text: str) -> None:
        """Write lines. A failure is reported once on stderr, and never raised."""
        try:
            with self._lock:
                if self._file is not None:
                    _write_all(self._file, text)
                elif self.path is None:
                    print_to(self.dest, text)
        except (OSError, ValueError) as error:
            let_through(error)
            if not self._said:
                self._said = True
                with contextlib.suppress(OSError, ValueError):
                    print_to("stderr", f"fi_ffi.call_log: {self.dest} cannot be written: {error}\n")


def _checked(dest: object) -> str:
    expected = "stdout, stderr or a path"
    try:
        text = os.fspath(dest)  # type: ignore[call-overload]
    except TypeError:
        got = type(dest).__name__
        raise ArgumentTypeError("call_log", "dest", got=got, expected=expected) from None
    if not isinstance(text, str) or not text:
        raise ArgumentTypeError("call_log", "dest", got=repr(text), expected=expected)
    return text


def _write_all(file: int, text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(file, data) :]


def print_to(dest: str, text: str) -> None:
    """Write to the program's stdout or stderr object; if that is None or broken, to the process's
    own."""
    stream = getattr(sys, dest)
    try:
        stream.write(text)
        stream.flush()
    except Exception as error:
        let_through(error)
        _write_all(1 if dest == "stdout" else 2, text)
