"""Pauses: a server that refused is not asked again for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fi_ffi.errors import FetchError
from fi_ffi.loader.permission import is_withheld

# Seconds before a server that refused is asked again.
UNREACHABLE = 30.0


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
