"""The lock, `wheels.lock`: the release that is used by default.

It also pins every file that may be fetched, which `fetch/wheels_lock.py` reads.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

from fi_ffi.errors import LoaderError
from fi_ffi.loader.cache import expanded

SCHEMA = 1
ENVIRONMENT = "FI_FFI_LOCK"
# What a malformed lock may raise.
UNREADABLE = (OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError)


def lock_path() -> Path:
    """Return `FI_FFI_LOCK`, or the lock in the installed package or beside a source tree."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return expanded(chosen, ENVIRONMENT)
    package = Path(__file__).resolve().parent.parent
    inside = package / "wheels.lock"
    return inside if inside.exists() else package.parent / "wheels.lock"


def default_release() -> str:
    """Return the default of the lock, which is read once."""
    return _default_of(lock_path())


@functools.cache
def _default_of(path: Path) -> str:
    try:
        return str(read_data(path)["kernels"]["default"])
    except (LookupError, TypeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> LoaderError:
    """Return the error that a file is not a lock; it names the variable that names the file."""
    named = f" that {ENVIRONMENT} names" if os.environ.get(ENVIRONMENT) else ""
    return LoaderError(f"{path} is not a readable lock{named}: {error!r}")


def read_data(path: Path) -> dict[str, Any]:
    """Return what a lock has; `LoaderError` names the file and the problem."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    try:
        data = tomllib.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, not {SCHEMA}")
        return dict(data)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
