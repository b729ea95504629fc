"""Whether a server is asked: fetching must be allowed, and after a refusal some time is waited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fi_ffi.errors import FetchError
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.permission import OFFLINE, FetchNotAllowed, is_on, is_withheld, may_fetch

# Seconds before a server that refused is asked again.
UNREACHABLE = 30.0


def check_permission(what: str) -> None:
    """Raise `FetchError` if fetching is not allowed; `what` is what would have been fetched."""
    # First: being asked would not help.
    if is_on(OFFLINE):
        raise FetchError(
            f"FI_FFI_OFFLINE=1, and {what} is not in the cache at {cache_root()}: fetch it once "
            "where there is a network, or copy a cache that has it"
        )
    if not may_fetch():
        raise FetchNotAllowed(
            f"{what} is not in the cache at {cache_root()}, and nothing is fetched unasked"
        )


class Cooldown:
    """Repeats a server's refusal for UNREACHABLE seconds instead of asking the server again."""

    def __init__(self) -> None:
        self._refusal, self._refused_at = "", -UNREACHABLE

    @contextmanager
    def asking(self, refusals: type[FetchError] = FetchError) -> Iterator[None]:
        """Remember a refusal that is raised inside the block; raise it at once if there is one."""
        if time.monotonic() - self._refused_at < UNREACHABLE:
            raise FetchError(self._refusal)
        try:
            yield
        except refusals as error:
            if not is_withheld(error):  # otherwise nobody was asked
                self._refusal, self._refused_at = str(error), time.monotonic()
            raise
