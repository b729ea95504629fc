"""How long to wait for a server, and how often to try again."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from fi_ffi.errors import FetchError
from fi_ffi.loader.urls import redact

_ENOUGH = 1 << 20  # bytes of progress after which earlier failures are forgiven


@dataclass(frozen=True)
class Policy:
    """How long to wait and how often to try again."""

    tries: int = 5
    first_wait: float = 0.5  # s before the second try, doubled before each one after it
    longest_wait: float = 60.0  # s; a server that asks for more is given up
    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # s without a byte
    slowest: float = 1024.0  # bytes/s, over any `read_timeout` of waiting
    redirects: int = 10


class Transient(Exception):
    """A failure after which the same request may succeed."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        self.reason, self.wait = reason, wait
        super().__init__(reason)


class Attempts:
    """Counts failures, waits between tries, and gives up."""

    def __init__(self, policy: Policy, url: str) -> None:
        self._policy, self._url = policy, url
        self._failures = self._progress = 0

    def moved(self, count: int) -> None:
        """Tell of progress: a connection that breaks now and then still gets there."""
        self._progress += max(0, count)
        if self._progress >= _ENOUGH:
            self._failures = self._progress = 0

    def failed(self, error: Transient) -> None:
        """Wait before the next try, or raise `FetchError` if there is none."""
        policy = self._policy
        self._failures += 1
        tries = f"{self._failures} {'try' if self._failures == 1 else 'tries'}"
        where = redact(self._url)
        if self._failures >= policy.tries:
            raise FetchError(
                f"{where}: {error.reason}; gave up after {tries}. Check the network and the "
                "proxy settings, or try later: what is already here is kept"
            )
        wait = min(policy.first_wait * 2 ** (self._failures - 1), policy.longest_wait)
        wait *= random.uniform(0.5, 1)  # so that many processes do not come back together
        if error.wait is not None:
            wait = error.wait
        if wait > policy.longest_wait:
            raise FetchError(
                f"{where}: {error.reason}; after {tries} the server asks to wait {wait:.0f} s, "
                f"which is longer than {policy.longest_wait:.0f} s. Try again later"
            )
        time.sleep(wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, which may be a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
