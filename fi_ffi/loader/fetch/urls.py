"""Addresses: checks, redirects, and redaction for printing."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urljoin, urlsplit

from fi_ffi.errors import FetchError

# Parsers disagree about text before or after the brackets of an IPv6 address.
_HOST = re.compile(r"(.*@)?([^\[\]@]*|\[[^\[\]@]*\](:\d*)?)")


def redact(url: str) -> str:
    """Return the address without secrets: user, password and query.

    If a password may contain an unescaped `/`, `?` or `#`, only the scheme remains.
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


def check_url(url: str) -> None:
    """Raise `FetchError` for anything but https, or http to this machine."""
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme.lower(), parts.hostname or "", parts.port
    except ValueError:  # the error's text may contain a password
        raise FetchError(f"{redact(url)}: no address of a file on a server") from None
    if not host or re.search(r"[\s\\\x00-\x1f]", url) or not _HOST.fullmatch(parts.netloc):
        raise FetchError(f"{redact(url)}: no address of a file on a server")
    if scheme != "https" and not (scheme == "http" and is_loopback(host)):
        raise FetchError(f"{redact(url)}: only https is used, and http within this machine")


def is_loopback(host: str) -> bool:
    """Return whether a host name denotes this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def redirected(url: str, location: str) -> str:
    """Return the target of a redirect; user and password are kept only for the same host."""
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
