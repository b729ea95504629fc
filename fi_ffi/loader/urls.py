"""Addresses: which may be used, where a redirect leads, and how to print one."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import urljoin, urlsplit

from fi_ffi.errors import FetchError

# What stands before or behind the brackets of an IPv6 address is read in more than one way.
_HOST = re.compile(r"(.*@)?([^\[\]@]*|\[[^\[\]@]*\](:\d*)?)")


def redact(url: str) -> str:
    """The address without what may be secret: user, password and query.

    Of one whose password has a `/`, `?` or `#` that is not escaped, nothing but the scheme.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.netloc.rpartition("@")[2], parts.port
        if "@" in f"{parts.path}{parts.query}{parts.fragment}":
            return f"{parts.scheme}://..."
        text = f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else "")
        return "".join(c if c.isprintable() else "?" for c in text)
    except ValueError:
        return "an address that cannot be read"


def is_file_url(url: str) -> bool:
    return url[:5].lower() == "file:"


_fetching: ContextVar[bool] = ContextVar("fi_ffi.fetching", default=True)
UNASKED = "nothing is fetched unasked"  # words of `refuse_offline`, by which its error is known


@contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Whether what is not on this machine may be fetched inside the block."""
    token = _fetching.set(allowed and _fetching.get())
    try:
        yield
    finally:
        _fetching.reset(token)


def may_fetch() -> bool:
    """Whether a `fetching` block, if any is open, allows it."""
    return _fetching.get()


def refuse_offline(what: str) -> None:
    """`FetchError` where nothing may be fetched: `what` is what would have been."""
    from fi_ffi.loader.cache import cache_root

    if not may_fetch():
        raise FetchError(
            f"{what} is not in the cache at {cache_root()}, and nothing is fetched unasked"
        )
    if os.environ.get("FI_FFI_OFFLINE") == "1":
        raise FetchError(
            f"FI_FFI_OFFLINE=1, and {what} is not in the cache at {cache_root()}: fetch it once "
            "where there is a network, or copy a cache that has it"
        )


def check_url(url: str) -> None:
    """`FetchError` for anything but https, or http to this machine."""
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme.lower(), parts.hostname or "", parts.port
    except ValueError:  # whose words may be of a password
        raise FetchError(f"{redact(url)}: no address of a file on a server") from None
    if not host or re.search(r"[\s\\\x00-\x1f]", url) or not _HOST.fullmatch(parts.netloc):
        raise FetchError(f"{redact(url)}: no address of a file on a server")
    if scheme != "https" and not (scheme == "http" and is_loopback(host)):
        raise FetchError(f"{redact(url)}: only https is used, and http within this machine")


def is_loopback(host: str) -> bool:
    """Whether a host's name is that of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def redirected(url: str, location: str) -> str:
    """Where a redirect leads; user and password stay only with the same host."""
    try:
        target = urljoin(url, location)
        parts, here = urlsplit(target), urlsplit(url)
        if origin(target) == origin(url) and "@" in here.netloc:
            user = here.netloc.rpartition("@")[0]
            host = parts.netloc.rpartition("@")[2]
            target = parts._replace(netloc=f"{user}@{host}").geturl()
    except ValueError:
        raise FetchError(f"{redact(url)}: a redirect to no address") from None
    if here.scheme == "https" and parts.scheme != "https":
        raise FetchError(f"{redact(url)}: redirects from https to {redact(target)}; refused")
    return target
