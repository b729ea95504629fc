"""Pieces of a file: over HTTP or from a disk, and a file-like object over them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from fi_ffi.errors import ArtifactError, FetchError
from fi_ffi.loader.cache import State
from fi_ffi.loader.http import Client, Response
from fi_ffi.loader.retries import Attempts, Transient
from fi_ffi.loader.urls import redact
from fi_ffi.loader.wheel import open_same

_CHUNK = 1 << 20
_MAX_SKIP = 1 << 16  # bytes; what a zip may have between two things that are read
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_NO_RANGE = re.compile(r"bytes \*/(\d{1,18})")


class NoRanges(FetchError):
    """The server sends whole files only."""


class Changed(FetchError):
    """The file is not the one that earlier requests read from."""


class Pieces(Protocol):
    """A file of which parts can be read."""

    def size(self) -> int: ...

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, as they come."""


class LocalPieces:
    """A file on disk."""

    def __init__(self, path: Path, state: State | None = None) -> None:
        """With `state`, the file must stay as it was when it was verified."""
        self._path, self._state = path, state

    def size(self) -> int:
        return self._path.stat().st_size

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        with open_same(self._path, self._state) as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
                start += len(chunk)
                yield chunk


@dataclass(frozen=True)
class Version:
    """What tells one content of an address from another."""

    total: int | None = None
    etag: str | None = None
    modified: str | None = None

    @classmethod
    def of(cls, response: Response, total: int | None) -> Version:
        return cls(total, response.headers.get("ETag"), response.headers.get("Last-Modified"))

    def same(self, other: Version) -> bool:
        if None not in (self.total, other.total) and self.total != other.total:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified


def content_range(response: Response) -> tuple[int, int, int]:
    """First byte, the byte after the last, and the file's size, as a 206 tells them."""
    text = response.headers.get("Content-Range", "none")
    found = _CONTENT_RANGE.fullmatch(text)
    if response.status != 206 or found is None or int(found[2]) >= int(found[3]):
        raise FetchError(
            f"{redact(response.url)}: the server answers {response.status} with the range "
            f"{text!r:.80}; it or a proxy before it is broken: use another address"
        )
    return int(found[1]), int(found[2]) + 1, int(found[3])


class RemotePieces:
    """A file on a server, which must stay the same from the first request to the last.

    Raises `NoRanges`, `Changed`, or `FetchError` for what else goes wrong, and
    `ArtifactError` for a file that is not of the pinned size.
    """

    def __init__(self, url: str, client: Client, size: int | None = None) -> None:
        self.url, self._client, self._pinned = url, client, size
        self._version: Version | None = None

    def size(self) -> int:
        if self._pinned is not None:
            return self._pinned
        if self._version is None:
            # A byte: HEAD is refused by addresses that are signed for GET, and not
            # every server knows ranges that count from the end.
            for _ in self.stream(0, 1):
                pass
        total = self._version.total if self._version else None
        assert total is not None
        return total

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        attempts, at = Attempts(self._client.policy, self.url), start
        while at < stop:
            try:
                with self._client.open(self.url, {"Range": f"bytes={at}-{stop - 1}"}) as response:
                    self._check(response, at, stop)
                    for chunk in response.chunks():
                        at += len(chunk)
                        attempts.moved(len(chunk))
                        if at > stop:
                            raise self._wrong("the server sends more than it announced")
                        yield chunk
                if at < stop:
                    raise Transient(f"the answer ended {stop - at} bytes early")
            except Transient as error:
                attempts.failed(error)

    def _check(self, response: Response, start: int, stop: int) -> None:
        if response.status == 200:
            raise NoRanges(
                f"{redact(self.url)}: the server sends whole files only, and this needs a part. "
                "A pinned sha256 allows fetching the whole file"
            )
        if response.status == 416:
            found = _NO_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            self._same(Version.of(response, int(found[1]) if found else None))
            raise Changed(f"{redact(self.url)}: the server has no bytes {start} to {stop}")
        first, end, total = content_range(response)
        self._same(Version.of(response, total))
        if (first, end) != (start, stop):
            asked = f"bytes {start}-{stop - 1}"
            raise self._wrong(f"asked for {asked}, the server sends {first}-{end - 1}")
        length = response.integer("Content-Length")
        if length is not None and length != stop - start:
            raise self._wrong(f"asked for {stop - start} bytes, the server announces {length}")

    def _same(self, version: Version) -> None:
        if None not in (self._pinned, version.total) and self._pinned != version.total:
            sizes = f"{version.total} bytes, pinned are {self._pinned}"
            raise ArtifactError(f"{redact(self.url)} is of {sizes}")
        if self._version is not None and not self._version.same(version):
            raise Changed(f"{redact(self.url)}: the file changed while it was read")
        self._version = version

    def _wrong(self, what: str) -> FetchError:
        advice = "the server or a proxy before it is broken: use another address"
        return FetchError(f"{redact(self.url)}: {what}; {advice}")


class PiecewiseFile:
    """A read-only file over pieces: those kept in memory, and one stream.

    `expected` is a range that will be read from its start to its end: one request
    serves it.  Other reads are served from `kept`, or take a request of their own.
    With `keep`, what was requested is added to `kept`.
    """

    def __init__(
        self,
        pieces: Pieces,
        kept: dict[int, bytes],
        size: int,
        *,
        expected: tuple[int, int] | None = None,
        keep: bool = False,
    ) -> None:
        self._pieces, self._kept, self._size, self._keep = pieces, kept, size, keep
        self._expected = expected
        self._at = 0
        self._stream: Iterator[bytes] | None = None
        self._buffer, self._buffer_at = b"", 0

    def __enter__(self) -> PiecewiseFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # a generator
            self._stream = None

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError(f"a position of {at}")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        data = self._from_memory(self._at, stop)
        if data is None:
            data = self._from_stream(self._at, stop)
        if data is None:
            data = b"".join(self._pieces.stream(self._at, stop))
            if self._keep:
                self._kept[self._at] = data
        self._at += len(data)
        return data

    def _from_memory(self, start: int, stop: int) -> bytes | None:
        starts = sorted(self._kept)
        index = bisect.bisect_right(starts, start) - 1
        if index < 0:
            return None
        at = starts[index]
        if stop > at + len(self._kept[at]):
            return None
        return self._kept[at][start - at : stop - at]

    def _from_stream(self, start: int, stop: int) -> bytes | None:
        if self._expected is None or not (self._expected[0] <= start < stop <= self._expected[1]):
            return None
        if self._keep:
            first, last = self._expected
            self._kept[first] = b"".join(self._pieces.stream(first, last))
            return self._from_memory(start, stop)
        if self._stream is None:
            self._stream, self._buffer_at = self._pieces.stream(start, self._expected[1]), start
        if start < self._buffer_at or start > self._buffer_at + len(self._buffer) + _MAX_SKIP:
            return None
        while self._buffer_at + len(self._buffer) < stop:
            chunk = next(self._stream, b"")
            if not chunk:
                return None
            self._buffer += chunk
        data = self._buffer[start - self._buffer_at : stop - self._buffer_at]
        self._buffer, self._buffer_at = self._buffer[stop - self._buffer_at :], stop
        return data
