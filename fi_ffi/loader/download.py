"""Whole files into the cache: resumable, hashed as they come, verified before use.

An unfinished file lies in `downloads/` of the cache as `<key>.part`, beside
`<key>.json`, which tells what the server said of it.  Whoever comes next goes on
from there; nothing else looks at it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader import cache
from fi_ffi.loader.http import Client, Response
from fi_ffi.loader.ranges import Version, content_range
from fi_ffi.loader.retries import Attempts, Transient
from fi_ffi.loader.urls import redact, refuse_offline
from fi_ffi.loader.wheel import safe_name

MAX_FILE = 16 << 30  # bytes; the largest published wheel has 2.1 GB
_CHUNK = 1 << 20
_SPARE = 16 << 20  # bytes of disk to leave free
_REPORT_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Report:
    """How far a download is: bytes, bytes per second, and seconds that remain."""

    name: str
    done: int
    total: int | None
    rate: float
    remaining: float | None


Reporter = Callable[[Report], None]


@dataclass(frozen=True)
class Downloaded:
    """A whole file in the cache."""

    path: Path
    sha256: str
    size: int


def fetch_file(
    url: str,
    name: str,
    *,
    sha256: str | None,
    size: int | None = None,
    client: Client | None = None,
    report: Reporter | None = None,
) -> Downloaded:
    """The file at `url` in the cache, under `name`.

    Without `sha256` the file is taken as it comes, and found by the hash it turns out
    to have.  Raises `ArtifactError` for another hash or size, `LoaderError` where the
    disk is too full, `FetchError` for what the network or the server does.
    """
    safe_name(name, redact(url))
    found = _cached(sha256, name)
    if found is not None:
        return found
    refuse_offline(name)
    key = sha256 or hashlib.sha256(url.encode()).hexdigest()
    with _alone(key) as folder:
        found = _cached(sha256, name)  # by the process that was waited for
        if found is not None:
            return found
        transfer = _Transfer(url, name, folder / key, client or Client(), report)
        digest, total = transfer.run(sha256, size)
        return Downloaded(_adopt(transfer.part, digest, name), digest, total)


def _cached(sha256: str | None, name: str) -> Downloaded | None:
    path = cache.find(sha256, name) if sha256 else None
    return Downloaded(path, sha256, path.stat().st_size) if path and sha256 else None


@contextlib.contextmanager
def _alone(key: str) -> Iterator[Path]:
    """The downloads' folder, while no other process fetches this file."""
    from filelock import FileLock

    root = cache.cache_root()
    folder = root / "downloads"
    try:
        cache.make_folder("downloads")
        lock = FileLock(folder / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise LoaderError(f"the cache at {root} cannot be written: {error}") from error
    try:
        yield folder
    finally:
        lock.release()


def _adopt(part: Path, sha256: str, name: str) -> Path:
    """Move a finished, verified file among the cache's objects."""
    try:
        part.touch()  # there is none yet where the server's file is empty
        return cache.adopt(part, sha256, name)
    except OSError as error:
        raise LoaderError(f"{part} cannot be written: {error}") from error
    finally:
        part.with_suffix(".json").unlink(missing_ok=True)


class _Transfer:
    """One file on its way; `part` is where it is written."""

    def __init__(
        self, url: str, name: str, stem: Path, client: Client, report: Reporter | None
    ) -> None:
        self.part, self._json = stem.with_suffix(".part"), stem.with_suffix(".json")
        self._url, self._name, self._client, self._report = url, name, client, report
        self._digest, self._done = hashlib.sha256(), 0
        self._notes = Version()
        self._joined = False  # from answers to several requests
        self._highest = 0  # bytes that were there at any time: fetching them again is no progress
        self._begun, self._begun_at, self._told = time.monotonic(), 0, float("-inf")

    def run(self, sha256: str | None, size: int | None) -> tuple[str, int]:
        """Fetch it all; its sha256 and size."""
        self._resume(sha256 is not None)
        for last in (False, True):
            self._fetch(size)
            found = self._digest.hexdigest()
            if sha256 in (None, found):
                return found, self._done
            self._drop()
            if last or not self._joined:
                break
            # Parts of two files, perhaps: once more, from the start.
        raise ArtifactError(
            f"{redact(self._url)}: sha256 is {found}, pinned is {sha256}: the address serves "
            "another file"
        )

    def _resume(self, pinned: bool) -> None:
        """Take up what is there: hash it."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._notes = Version(**json.loads(self._json.read_text()))
        # With a pinned hash a wrong part is found out at the end, else only by If-Range.
        if not pinned and not _validator(self._notes):
            self._drop()
        with contextlib.suppress(FileNotFoundError), self.part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                self._digest.update(chunk)
                self._done += len(chunk)
        self._begun_at = self._highest = self._done
        self._joined = self._done > 0

    def _drop(self) -> None:
        for path in (self.part, self._json):
            path.unlink(missing_ok=True)
        self._digest, self._done, self._notes = hashlib.sha256(), 0, Version()

    def _fetch(self, size: int | None) -> None:
        attempts = Attempts(self._client.policy, self._url)
        while not self._done or self._done != self._notes.total:
            try:
                with self._client.open(self._url, self._headers()) as response:
                    self._begin(response, size)
                    self._receive(response, attempts)
                if self._notes.total in (None, self._done):
                    return
                raise Transient(f"the answer ended at {self._done} of {self._notes.total} bytes")
            except Transient as error:
                attempts.failed(error)

    def _headers(self) -> dict[str, str]:
        if not self._done:
            return {}
        validator = _validator(self._notes)
        return {"Range": f"bytes={self._done}-"} | ({"If-Range": validator} if validator else {})

    def _begin(self, response: Response, size: int | None) -> None:
        """Look at an answer's headers: it goes on where the part ends, or begins anew."""
        if response.status == 200:
            total = response.integer("Content-Length")
            self._drop()
        elif response.status == 416 and self._done:
            self._drop()
            raise Transient("the server has less than was fetched before")
        else:
            first, _, total = content_range(response)
            self._joined = True
            if first != self._done:
                raise FetchError(
                    f"{redact(self._url)}: asked for the bytes from {self._done} on, the server "
                    f"sends them from {first} on; use another address"
                )
        version = Version.of(response, total)
        if not self._notes.same(version):
            self._drop()
            raise Transient("the file changed while it was fetched")
        self._notes = version
        if (size is not None and total not in (None, size)) or (total or 0) > MAX_FILE:
            self._drop()
            expected = f"pinned are {size}" if size is not None else f"at most {MAX_FILE}"
            raise ArtifactError(f"{redact(self._url)} is of {total} bytes, {expected}")
        self._check_space((total or size or 0) - self._done)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if needed + _SPARE > free:
            raise LoaderError(
                f"{self._name} needs {needed:,} bytes and {free:,} are free in "
                f"{self.part.parent}: make room, or set FI_FFI_CACHE_DIR to another directory"
            )

    def _receive(self, response: Response, attempts: Attempts) -> None:
        limit = MAX_FILE if self._notes.total is None else self._notes.total
        for chunk in response.chunks():
            if self._done + len(chunk) > limit:
                self._drop()
                raise FetchError(f"{redact(self._url)}: more than {limit} bytes came")
            self._append(chunk)
            attempts.moved(self._done - self._highest)
            self._highest = max(self._highest, self._done)
            self._tell()

    def _append(self, chunk: bytes) -> None:
        try:
            if not self._done:
                self._json.write_text(json.dumps(asdict(self._notes)))
            with self.part.open("ab") as file:
                file.write(chunk)
        except OSError as error:
            raise LoaderError(
                f"{self.part} cannot be written: {error.strerror}; make room, or set "
                "FI_FFI_CACHE_DIR to another directory. What is there is kept"
            ) from error
        self._digest.update(chunk)
        self._done += len(chunk)

    def _tell(self) -> None:
        now, total = time.monotonic(), self._notes.total
        if self._report is None or (now - self._told < _REPORT_EVERY and self._done != total):
            return
        rate = max(0, self._done - self._begun_at) / max(now - self._begun, 1e-9)
        remaining = (total - self._done) / rate if total is not None and rate else None
        self._told = now
        self._report(Report(self._name, self._done, total, rate, remaining))


def _validator(version: Version) -> str | None:
    """What If-Range may carry: a weak ETag does not vouch for single bytes."""
    strong = version.etag if version.etag and not version.etag.startswith("W/") else None
    return strong or version.modified
