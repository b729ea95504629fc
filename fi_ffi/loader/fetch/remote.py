"""A wheel on a server, of which only the needed parts are fetched.

The zip's directory, RECORD and each member take one range request each. The directory and RECORD of
a pinned wheel are kept in the cache. If the server has no ranges, or if nothing else vouches for
RECORD, the whole file is fetched.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import urllib.request
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from fi_ffi.abi import library
from fi_ffi.errors import ArtifactError
from fi_ffi.loader import cache, seed
from fi_ffi.loader.cache import State
from fi_ffi.loader.fetch.asking import check_permission
from fi_ffi.loader.fetch.download import Reporter, fetch_file
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.index import Index
from fi_ffi.loader.fetch.ranges import Changed, NoRanges, RangeFile, RemotePieces
from fi_ffi.loader.fetch.urls import is_file_url, redact
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel
from fi_ffi.loader.wheel import SLACK, ReadableZip, WheelReader, open_same, verify_file

# "full": if RECORD is not pinned, the whole file must have its pinned sha256. "record": an unpinned
# RECORD is accepted as it is.
Verify = Literal["record", "full"]

# The end of a zip without a comment: its end record, and zip64's two before it.
_TAIL = 22 + 20 + 56
_END = b"PK\x05\x06"
_LONGEST_TAIL = _TAIL + 0xFFFF
_FIXED_HEADER = 30  # bytes before a member's name in its local header
_RECORD = ".dist-info/RECORD"
_BUFFER = 1 << 16  # bytes; larger than the gaps between the parts that are read

_log = logging.getLogger(__name__)
_locks: dict[str, threading.RLock] = {}  # by address; held while a wheel is opened again
library.renew_after_fork(globals(), "_locks", dict)


class RemoteWheel(WheelReader):
    """A wheel at an https or file address, read member by member.

    `client` counts requests and bytes. Several threads may extract at once. Raises `FetchError` for
    failures of the network or the server, and `ArtifactError` if the bytes are wrong or cannot be
    verified.
    """

    def __init__(
        self,
        url: str,
        *,
        sha256: str | None = None,
        size: int | None = None,
        record_sha256: str | None = None,
        verify: Verify = "full",
        client: Client | None = None,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(redact(url), record_sha256)
        self.url, self.client = url, client or Client()
        self.name = unquote(urlsplit(url).path.rpartition("/")[2])
        self._sha256, self._size, self._report = sha256, size, report
        self._must_verify = verify == "full" and record_sha256 is None
        if self._must_verify and sha256 is None:
            raise ArtifactError(f"{self._origin}: there is no sha256 to verify the file against")
        # The whole file if it is on this machine; otherwise `_index` holds its directory and
        # RECORD.
        self._file: tuple[Path, State | None] | None = None
        self._index = Index(0, {})
        self._pieces = RemotePieces(url, self.client, size)
        self._stored = self._take_stored()
        if not self._stored:
            try:
                self._begin()
            except (NoRanges, Changed) as error:
                self._recover(error)

    @classmethod
    def of(
        cls, pin: PinnedWheel, *, verify: Verify = "full", report: Reporter | None = None
    ) -> RemoteWheel:
        """Open the wheel of an entry of the lock."""
        return cls(
            pin.url,
            sha256=pin.sha256,
            size=pin.size,
            record_sha256=pin.record_sha256,
            verify=verify,
            report=report,
        )

    def extract(self, member: str) -> Path:
        index = self._index
        try:
            return super().extract(member)
        except (NoRanges, Changed, ArtifactError) as error:
            with _locks.setdefault(self.url, threading.RLock()):
                if self._index is index:  # no other thread has recovered meanwhile
                    self._recover(error)
            return super().extract(member)

    def _open(self, member: str | None) -> AbstractContextManager[ReadableZip]:
        if self._file is not None:
            return open_same(*self._file)
        index = self._index
        if member is None:  # what is read of the directory is stored
            return RangeFile(self._pieces, index.pieces, index.size, None, keep=True)
        extent = _extents([*self._infos.values()], self._directory_at)[member]
        if not member.endswith(_RECORD):
            check_permission(f"a member of {self.name}")
            size = f"{extent[1] - extent[0]:,} bytes"
            _log.info("fetching a member of %s, %s, from %s", self.name, size, self._origin)
        raw = RangeFile(self._pieces, index.pieces, index.size, extent, keep=False)
        return io.BufferedReader(raw, _BUFFER)

    def _read_record(self, member: str) -> bytes:
        if not self._index.record:
            self._index = replace(self._index, record=super()._read_record(member).decode())
        return self._index.record.encode()

    def _load(self) -> None:
        super()._load()
        if self._pinned_record:
            self.trust = "record-pinned"
        elif self._file is not None and (self._must_verify or not is_file_url(self.url)):
            self.trust = "file-verified"
        else:
            self.trust = "record-unpinned"
            _log.info("%s: nothing pins RECORD, members are as it says", self._origin)

    def _take_stored(self) -> bool:
        """Use the cached directory and RECORD, if they are valid."""
        if self._sha256 is None or self._must_verify or is_file_url(self.url):
            return False
        stored = Index.load(self._sha256)
        if stored is None or cache.find(self._sha256, self.name) is not None:
            return False
        self._index = stored
        with contextlib.suppress(ArtifactError):  # damaged, or stored under another pin
            self._load()
            return True
        return False

    def _begin(self, whole: bool = False) -> None:
        """Read the directory and RECORD from the file itself, and store them."""
        self._file = self._whole_file(fetch=whole or self._must_verify)
        self._index = Index(0, {})
        if self._file is not None:
            self._load()
            return
        check_permission(f"the directory of {self.name}")
        _log.info("fetching the directory and RECORD of %s", self._origin)
        self._pieces = RemotePieces(self.url, self.client, self._size)
        self._index = Index(self._pieces.size(), {})
        # Fetched before zipfile looks for it, since zipfile reports every read error as "not a zip
        # file".
        for length in (_TAIL, _LONGEST_TAIL):
            start = max(0, self._index.size - length)
            tail = b"".join(self._pieces.stream(start, self._index.size))
            self._index.pieces[start] = tail
            if tail[-22:-18] == _END and tail[-2:] == b"\0\0":
                break
        self._load()
        if self._sha256:
            self._index.store(self._sha256)

    def _whole_file(self, *, fetch: bool) -> tuple[Path, State | None] | None:
        """Return the file on this machine, if it is here or must be fetched whole."""
        if is_file_url(self.url):
            path = Path(urllib.request.url2pathname(urlsplit(self.url).path))
            if not path.is_file():
                raise ArtifactError(f"{path}: there is no such file")
            verified = self._sha256 if self._must_verify else None
            return path, verify_file(path, verified) if verified else None
        stored = seed.find(self._sha256, self.name) if self._sha256 else None
        if stored is not None:
            return stored
        if not fetch:
            return None
        pins = {"sha256": self._sha256, "size": self._size}
        how = {"client": self.client, "report": self._report}
        return fetch_file(self.url, self.name, **pins, **how).path, None  # type: ignore[arg-type]

    def _recover(self, error: NoRanges | Changed | ArtifactError) -> None:
        """Open the wheel again after the file changed, or after ranges proved unavailable."""
        whole = isinstance(error, NoRanges) and self._sha256 is not None
        # The stored parts may belong to an older file than the server's.
        outdated = isinstance(error, Changed) or (isinstance(error, ArtifactError) and self._stored)
        if not whole and not outdated:
            raise error
        if whole:
            _log.info("%s: no ranges there, the whole file is fetched", self._origin)
        self._stored = False
        self._begin(whole)


def _extents(infos: Sequence[zipfile.ZipInfo], end: int) -> dict[str, tuple[int, int]]:
    """Return each member's range, from its local header to the next member.

    The directory does not have the length of a local header, but it has the next member's offset.
    """
    starts = sorted({info.header_offset for info in infos})
    following = dict(zip(starts, [*starts[1:], end], strict=True))
    extents = {}
    for info in infos:
        start = info.header_offset
        header = _FIXED_HEADER + len(info.filename.encode()) + len(info.extra) + SLACK
        stop = min(following[start], start + header + info.compress_size)
        extents[info.filename] = (start, max(start, stop))
    return extents
