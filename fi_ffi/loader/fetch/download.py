"""Downloads of whole files into the cache: resumable, and verified by hash before use.

An unfinished file of a known sha256 is kept as `downloads/<sha256>.part` in the cache. The next
download resumes it; nothing else reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fi_ffi.errors import ArtifactError, LoaderError, let_through
from fi_ffi.loader import cache, trust
from fi_ffi.loader.fetch.asking import check_permission
from fi_ffi.loader.fetch.http import Attempts, Client, Policy, Transient
from fi_ffi.loader.fetch.ranges import Changed, NoRanges, Overrun, RemotePieces
from fi_ffi.loader.fetch.urls import redact
from fi_ffi.loader.wheel import safe_name

_CHUNK = 1 << 20
_SPARE = 16 << 20  # bytes of disk to leave free
_REPORT_EVERY = 0.1  # seconds
_POLL = 0.02  # seconds between looks at another process's download

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Progress of a download, in bytes."""

    name: str
    done: int
    total: int | None


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
    """Fetch the file at `url` into the cache, under `name`.

    Without `sha256` the file is accepted as it is and stored under its own hash. Raises
    `ArtifactError` for another hash or size, `LoaderError` if the disk is too full, and
    `FetchError` for failures of the network or the server.
    """
    safe_name(name, redact(url))
    found = _cached(sha256, name)
    if found is not None:
        return found
    check_permission(name)
    with _place(sha256 or hashlib.sha256(url.encode()).hexdigest()) as part:
        found = _cached(sha256, name)  # another process may have fetched it during the wait
        if found is not None:
            return found
        transfer = _Transfer(url, name, part, size, client or Client(), report)
        digest = transfer.run(sha256)
        return Downloaded(_adopt(part, digest, name), digest, transfer.done)


def _cached(sha256: str | None, name: str) -> Downloaded | None:
    path = cache.find(sha256, name) if sha256 else None
    return Downloaded(path, sha256, path.stat().st_size) if path and sha256 else None


@contextlib.contextmanager
def _place(key: str) -> Iterator[Path]:
    """Yield the file to write to: the `.part` of `key`, after other writers are done.

    Yields a temporary instead if another process holds the part without progress for PATIENCE, or
    if the file system has no locks.
    """
    root = cache.cache_root()
    with contextlib.ExitStack() as stack:
        try:
            part = cache.file_in("downloads", f"{key}.part")
            if not _lock(part, stack):
                part = stack.enter_context(cache.temporary()).path
        except OSError as error:
            raise LoaderError(f"the cache at {root} cannot be written: {error}") from error
        yield part


def _lock(part: Path, stack: contextlib.ExitStack) -> bool:
    """Wait for a part's lock; return whether it was acquired.

    The wait ends after PATIENCE in which the part grew less than a transfer must.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(cache.file_in("downloads", f"{part.stem}.lock"))
    seen, deadline = _size(part), time.monotonic() + cache.PATIENCE
    while True:
        try:
            stack.enter_context(lock.acquire(timeout=0))
            return True
        except Timeout:
            now = time.monotonic()
            if now >= deadline:
                size = _size(part)
                # A part that became smaller was begun anew.
                grown = size - (seen if size >= seen else 0)
                if grown < Policy.min_bytes_per_s * cache.PATIENCE:
                    return False
                seen, deadline = size, now + cache.PATIENCE
            time.sleep(_POLL)
        except (OSError, NotImplementedError) as error:
            let_through(error)
            _log.info("%s cannot be locked (%s): it is fetched for this process", part, error)
            return False


def _size(part: Path) -> int:
    try:
        return part.stat().st_size
    except OSError as error:
        let_through(error)
        return 0


def _adopt(part: Path, sha256: str, name: str) -> Path:
    """Move a finished, verified file into the cache's objects."""
    try:
        part.touch()  # an empty file was never written
        return cache.adopt(part, sha256, name)
    except OSError as error:
        raise LoaderError(f"{part} cannot be written: {error}") from error


class _Transfer:
    """A transfer of one file to `part`; `done` bytes are on disk and hashed."""

    def __init__(
        self,
        url: str,
        name: str,
        part: Path,
        size: int | None,
        client: Client,
        report: Reporter | None,
    ) -> None:
        self.part, self.done = part, 0
        self._name, self._where, self._size, self._report = name, redact(url), size, report
        self._remote = RemotePieces(url, client, size)
        self._attempts = Attempts(client.policy, url)
        self._digest = hashlib.sha256()
        self._begun_at, self._told = 0, float("-inf")

    def run(self, sha256: str | None) -> str:
        """Fetch the whole file and return its sha256."""
        if sha256 is None:
            self._restart()  # nothing identifies an earlier part as one of this file
        else:
            self._resume()
            if self._digest.hexdigest() == sha256:
                return sha256
        size = f"{self._size:,} bytes" if self._size is not None else "a file of unknown size"
        _log.info("fetching %s, %s, from %s", self._name, size, self._where)
        for last in (False, True):
            self._receive()
            found = self._digest.hexdigest()
            if sha256 in (None, found):
                return found
            self._restart()
            if last or not (self._begun_at or self._attempts.total):
                break
            # The file may mix parts of two versions: retry once from the start.
            self._remote.forget()
        raise ArtifactError(
            f"{self._where}: sha256 is {found}, pinned is {sha256}: the address serves another file"
        )

    def _resume(self) -> None:
        """Hash the part that is on disk."""
        with contextlib.suppress(FileNotFoundError), self._opened(os.O_RDONLY) as file:
            while chunk := file.read(_CHUNK):
                self._digest.update(chunk)
                self.done += len(chunk)
        self._begun_at = self.done
        self._attempts.reached(self.done)

    def _opened(self, flags: int) -> BinaryIO:
        """Open the part, which others cannot write to; a link is not followed."""
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.part, flags, 0o600)
        file: BinaryIO = os.fdopen(fd, "ab" if flags & os.O_APPEND else "rb")
        with contextlib.ExitStack() as stack:
            stack.callback(file.close)
            trust.check_object(self.part, os.fstat(fd))
            stack.pop_all()
        return file

    def _restart(self) -> None:
        self.part.unlink(missing_ok=True)
        self._digest, self.done = hashlib.sha256(), 0

    def _receive(self) -> None:
        """Fetch the missing part, or the whole file if the server has no ranges."""
        while True:
            try:
                chunks = self._remote.stream(self.done, attempts=self._attempts)
                with contextlib.closing(chunks):
                    for chunk in chunks:
                        self._append(chunk)
                return
            except NoRanges:
                self._restart()
            except Changed:
                self._restart()
                self._remote.forget()
                self._attempts.failed(Transient("the file changed while it was fetched"))
            except (ArtifactError, Overrun):
                self._restart()
                raise

    def _append(self, chunk: bytes) -> None:
        try:
            if self.done == self._begun_at:
                self._check_space()
            with self._opened(os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                file.write(chunk)
        except OSError as error:
            raise LoaderError(
                f"{self.part} cannot be written: {error.strerror}; make room, or set "
                "FI_FFI_CACHE_DIR to another directory. What is there is kept"
            ) from error
        self._digest.update(chunk)
        self.done += len(chunk)
        self._report_progress()

    def _check_space(self) -> None:
        needed = (self._remote.total or 0) - self.done
        free = shutil.disk_usage(self.part.parent).free
        if needed + _SPARE > free:
            raise LoaderError(
                f"{self._name} needs {needed:,} bytes and {free:,} are free in "
                f"{self.part.parent}: make room, or set FI_FFI_CACHE_DIR to another directory"
            )

    def _report_progress(self) -> None:
        now, total = time.monotonic(), self._remote.total
        if self._report is None or (now - self._told < _REPORT_EVERY and self.done != total):
            return
        self._told = now
        self._report(Report(self._name, self.done, total))
