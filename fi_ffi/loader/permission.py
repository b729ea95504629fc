"""Permission to fetch: FI_FFI_OFFLINE=1 withholds it, and so does a `fetching(False)` block.

Variables that are switches are read here: 1 is on; 0, empty or unset is off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fi_ffi.errors import ArgumentError, FetchError

OFFLINE = "FI_FFI_OFFLINE"

_fetching: ContextVar[bool] = ContextVar("fi_ffi.fetching", default=True)


class FetchNotAllowed(FetchError):
    """Something was not fetched only because a `fetching` block forbids it."""


def is_on(variable: str) -> bool:
    """Return whether a switch is on; raise `ArgumentError` for what is no switch's value."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ArgumentError("environment", variable, got=repr(value), expected="1, or 0 for off")
    return value == "1"


@contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Allow or forbid fetching inside the block; an outer block that forbids it prevails."""
    token = _fetching.set(allowed and _fetching.get())
    try:
        yield
    finally:
        _fetching.reset(token)


def may_fetch() -> bool:
    """Return whether the open `fetching` blocks allow fetching."""
    return _fetching.get()


def is_withheld(error: Exception) -> bool:
    """Return whether an error, or its cause, is that a `fetching` block forbids fetching."""
    return isinstance(error, FetchNotAllowed) or isinstance(error.__cause__, FetchNotAllowed)
