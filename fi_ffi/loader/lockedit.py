"""Changing `wheels.lock` in place: comments and order stay, and it is never half written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fi_ffi.errors import LoaderError
from fi_ffi.loader.lock import read_lock


def load(path: Path) -> Any:
    """The document of a lock; `LoaderError` where it cannot be read."""
    try:
        return tomlkit.parse(path.read_text())
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise LoaderError(f"{path} is not a readable lock: {error}") from error


def append_kernels(path: Path, entry: Mapping[str, object]) -> None:
    """Add a kernel wheel at the end."""
    document = load(path)
    table = tomlkit.table()
    table.update(entry)
    files = document["kernels"]["files"]
    if files:
        files[-1].add(tomlkit.nl())
    files.append(table)
    _write(path, document)


def update(path: Path, file: str, entry: Mapping[str, object]) -> None:
    """Set keys of the entry of a file."""
    document = load(path)
    for section in ("libtvm-ffi", "kernels"):
        for table in document[section]["files"]:
            if table["file"] == file:
                table.update(entry)
    _write(path, document)


def _write(path: Path, document: Any) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
            try:
                new.write(tomlkit.dumps(document))
                new.flush()
                read_lock(Path(new.name))  # what could not be read again is not written
                os.fsync(new.fileno())
                os.chmod(new.name, path.stat().st_mode & 0o777)
                os.replace(new.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(new.name)
                raise
    except OSError as error:
        raise LoaderError(
            f"{path} cannot be written: {error.strerror}; --lock names another lock, and "
            "FI_FFI_LOCK makes it the one in use"
        ) from error
