"""Permission to fetch: FI_FFI_OFFLINE=1 withholds it, and so does a `fetching(False)` block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fi_ffi.errors import FetchError
from fi_ffi.loader.cache import cache_root

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


def check_permission(what: str) -> None:
    """Raise `FetchError` if fetching is not allowed; `what` is what would have been fetched."""
    # First: being asked would not help.
    if os.environ.get("FI_FFI_OFFLINE") == "1":
        raise FetchError(
            f"FI_FFI_OFFLINE=1, and {what} is not in the cache at {cache_root()}: fetch it once "
            "where there is a network, or copy a cache that has it"
        )
    if not may_fetch():
        raise FetchNotAllowed(
            f"{what} is not in the cache at {cache_root()}, and nothing is fetched unasked"
        )
