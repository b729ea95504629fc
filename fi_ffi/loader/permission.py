"""Permission to fetch: FI_FFI_OFFLINE=1 withholds it, and so does a `fetching(False)` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fi_ffi.errors import FetchError

_fetching: ContextVar[bool] = ContextVar("fi_ffi.fetching", default=True)


class FetchNotAllowed(FetchError):
    """Something was not fetched only because a `fetching` block forbids it."""


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
