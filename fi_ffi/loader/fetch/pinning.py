"""Entries of a lock: what a wheel's name says, the links of an index page, and writing.

An index page is HTML with links such as `…/wheel.whl#sha256=…`: a project's page of a package index
(PEP 503), or any other page of links. Its server vouches for the sha256, by TLS.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from fi_ffi.errors import ArgumentError, ArtifactError, FetchError, LoaderError
from fi_ffi.loader.fetch.http import Attempts, Client, Transient
from fi_ffi.loader.fetch.urls import check_url, redact
from fi_ffi.loader.fetch.wheels_lock import Lock, read_lock

_PROJECT = re.compile(r"flashinfer_jit_cache(?:_(?P<sm>sm\d+[af]?))?")
_LOCAL = re.compile(r"(?P<cuda>cu\d+)(?:\.(?P<sm>sm\d+[af]?))?(?:\.sm\d+[af]?)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST = 32 << 20  # bytes of a page
_NEW = """\
# Kernel wheels that this user has pinned; docs/wheels-lock.md describes the format.

schema = 1

[kernels]
"""


@dataclass(frozen=True)
class Link:
    """A link to a wheel: its address without the fragment, its name, and its hash by algorithm."""

    url: str
    file: str
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, address: str) -> Link:
        """Return a link from an address with a fragment."""
        url, fragment = urldefrag(address)
        parts = (part.partition("=") for part in fragment.split("&") if "=" in part)
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        return cls(url, name, {key: value.lower() for key, _, value in parts})

    def sha256(self) -> str:
        """Return the sha256; raise `ArtifactError` if there is none."""
        found = self.hashes.get("sha256", "")
        if _SHA256.fullmatch(found):
            return found
        others = ", ".join(sorted({*self.hashes} - {"sha256"}))
        has = "a broken #sha256=" if found else f"only {others}" if others else "no #sha256="
        raise ArtifactError(
            f"the link to {self.file} has {has}, so nothing vouches for the file: name a page "
            "whose links have #sha256=, such as a package index's page of the project"
        )


def describe(name: str) -> dict[str, str]:
    """Return what a kernel wheel's name says: release, cuda, platform, layout, sm."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        _, version, _, tags = parse_wheel_filename(name)
    except InvalidWheelFilename as error:
        raise ArgumentError("add", "FILE", got=name, expected="a wheel's name") from error
    found = {"release": version.public}
    project = _PROJECT.fullmatch(name.partition("-")[0])
    local = _LOCAL.fullmatch(version.local or "")
    platforms = {tag.platform for tag in tags}
    machines = {match[1] for p in platforms if (match := re.search(r"linux(?:_\d+)*_(\w+)", p))}
    if len(machines) == 1:
        found["platform"] = f"linux-{machines.pop()}"
    if project:
        found["layout"] = "provider" if project["sm"] else "monolithic"
    several = (version.local or "").count(".sm") > 1
    sm = (project and project["sm"]) or (local and not several and local["sm"])
    if local:
        found["cuda"] = local["cuda"]
    if sm:
        found["sm"] = sm
    return found


def links_at(address: str, client: Client | None = None) -> tuple[str, list[Link]]:
    """Return the address of a page after redirects, and its links to wheels of kernels.

    The address of a wheel is its own only link, and is not fetched.
    """
    if "@" in address:
        raise ArgumentError(
            "add", "URL", got=redact(address), expected="no password: ~/.netrc may hold it"
        )
    url, _ = urldefrag(address)
    check_url(url)
    if urlsplit(url).path.endswith(".whl"):
        return url, [Link.of(address)]
    final, text = _page(url, client or Client())
    reader = _Links(final)
    try:
        reader.feed(text)
    except AssertionError as error:  # what Python's parser raises for a declaration
        raise FetchError(f"{redact(final)}: no HTML that can be read: {error}") from error
    found = [Link.of(each) for each in dict.fromkeys(reader.found)]
    kernels = [link for link in found if _is_kernels(link.file)]
    for link in kernels:
        check_url(link.url)
    return final, kernels


def _is_kernels(file: str) -> bool:
    return file.endswith(".whl") and _PROJECT.fullmatch(file.partition("-")[0]) is not None


class _Links(HTMLParser):
    """Collects the targets of a page's links, as whole addresses."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self._base = base
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if target and tag in ("a", "base"):
            with contextlib.suppress(ValueError):
                whole = urljoin(self._base, target)
                if tag == "a":
                    self.found.append(whole)
                else:
                    self._base = whole


def _page(url: str, client: Client) -> tuple[str, str]:
    """Fetch a page; return its address after redirects, and its text."""
    attempts = Attempts(client.policy, url)
    while True:
        try:
            with client.open(url) as answer:
                content = b""
                for chunk in client.chunks(answer):
                    content += chunk
                    if len(content) > _LONGEST:
                        raise FetchError(f"{redact(url)}: longer than {_LONGEST} bytes, no page")
                    attempts.reached(len(content))
                return str(answer.url), content.decode(errors="replace")
        except Transient as error:
            attempts.failed(error)


def append(path: Path, entry: Mapping[str, object], above: Lock | None = None) -> None:
    """Add an entry at the end of a lock, which is made if it is missing.

    `above` is the lock beside which it is read, if it is the user's own.
    """
    try:
        text = path.read_text() if path.exists() or above is None else _NEW
    except (OSError, UnicodeDecodeError) as error:
        raise LoaderError(f"{path} is not a readable lock: {error}") from error
    # JSON's strings and numbers are TOML's as well.
    lines = "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in entry.items()
    )
    end = "" if text.endswith("\n") else "\n"
    write(path, f"{text}{end}\n[[kernels.files]]\n{lines}", above)


def write(path: Path, text: str, above: Lock | None = None) -> None:
    """Replace a lock in one step; a text that cannot be read as a lock is not written."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
            try:
                new.write(text)
                new.flush()
                read_lock(Path(new.name), above)
                os.fsync(new.fileno())
                mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
                os.chmod(new.name, mode)
                os.replace(new.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(new.name)
                raise
    except OSError as error:
        raise LoaderError(
            f"{path} cannot be written: {error.strerror}; FI_FFI_LOCK names another lock"
        ) from error
