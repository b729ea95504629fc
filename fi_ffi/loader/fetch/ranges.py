"""Ranges of a file over HTTP, and a file object over them."""

from __future__ import annotations

import io
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from fi_ffi.errors import ArtifactError, FetchError
from fi_ffi.loader.fetch.http import Attempts, Client, Transient
from fi_ffi.loader.fetch.urls import redact

MAX_FILE = 16 << 30  # bytes; the largest published wheel has 2.1 GB
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_NO_RANGE = re.compile(r"bytes \*/(\d{1,18})")


class NoRanges(FetchError):
    """The server does not support ranges."""


class Overrun(FetchError):
    """The server sent more bytes than it announced, or than a file may have."""


class Changed(FetchError):
    """The file changed since an earlier request."""


@dataclass(frozen=True)
class Version:
    """The headers that distinguish versions of a file at one address."""

    total: int | None = None
    etag: str | None = None
    modified: str | None = None

    @classmethod
    def of(cls, answer: Any, total: int | None) -> Version:
        return cls(total, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))

    def same(self, other: Version) -> bool:
        if None not in (self.total, other.total) and self.total != other.total:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified


class RemotePieces:
    """A file on a server, which must not change between the first request and the last.

    Raises `NoRanges`, `Changed`, `ArtifactError` if the size is not the pinned one, and
    `FetchError` for other failures.
    """

    def __init__(self, url: str, client: Client, size: int | None = None) -> None:
        self.url, self._client, self._pinned = url, client, size
        self._version: Version | None = None

    @property
    def total(self) -> int | None:
        """The file's size, or None while it is unknown."""
        return self._version.total if self._version and self._version.total else self._pinned

    def size(self) -> int:
        if self.total is None:
            # Fetches one byte: an address signed for GET refuses HEAD, and some servers do not
            # support ranges that count from the end.
            for _ in self.stream(0, 1):
                pass
        assert self.total is not None
        return self.total

    def forget(self) -> None:
        """Accept any version of the file in the next request."""
        self._version = None

    def stream(
        self, start: int, stop: int | None = None, attempts: Attempts | None = None
    ) -> Generator[bytes, None, None]:
        """Yield the bytes from `start` to `stop`, or to the file's end, as they arrive.

        A broken connection is resumed where it ended. `attempts` counts the failures of a transfer
        that takes several calls.
        """
        attempts, at = attempts or Attempts(self._client.policy, self.url, start), start

        def headers(at: int) -> dict[str, str]:
            # No If-Range: the answer's own headers, or the sha256, reveal a changed file.
            whole = not at and stop is None
            return {} if whole else {"Range": f"bytes={at}-{'' if stop is None else stop - 1}"}

        while stop is None or at < stop:
            try:
                with self._client.open(self.url, headers(at)) as answer:
                    end = self._check(answer, at, stop)
                    for chunk in self._client.chunks(answer):
                        at += len(chunk)
                        if at > (MAX_FILE if end is None else end):
                            raise self._overrun(end)
                        attempts.reached(at)
                        yield chunk
                if end in (None, at):
                    return
                raise Transient(f"the answer ended at byte {at} of {end}")
            except Transient as error:
                attempts.failed(error)

    def _check(self, answer: Any, start: int, stop: int | None) -> int | None:
        """Check an answer's headers; return the offset where its body ends, if known."""
        length = self._length(answer)
        if answer.status_code == 200:
            if start or stop is not None:
                raise NoRanges(
                    f"{redact(self.url)}: the server sends whole files only, and this needs a "
                    "part. A pinned sha256 allows fetching the whole file"
                )
            self._same(Version.of(answer, length))
            return length
        text = answer.headers.get("Content-Range", "none")
        if answer.status_code == 416:
            none = _NO_RANGE.fullmatch(text)
            self._same(Version.of(answer, int(none[1]) if none else None))
            raise Changed(f"{redact(self.url)}: the server has no bytes {start} to {stop}")
        found = _CONTENT_RANGE.fullmatch(text)
        if found is None or int(found[2]) >= int(found[3]):
            raise self._wrong(
                f"the server answers {answer.status_code} with the range {text!r:.80}"
            )
        first, end, total = int(found[1]), int(found[2]) + 1, int(found[3])
        self._same(Version.of(answer, total))
        stop = total if stop is None else stop
        if (first, end) != (start, stop):
            asked = f"bytes {start}-{stop - 1}"
            raise self._wrong(f"asked for {asked}, the server sends {first}-{end - 1}")
        if length is not None and length != stop - start:
            raise self._wrong(f"asked for {stop - start} bytes, the server announces {length}")
        return end

    def _length(self, answer: Any) -> int | None:
        text = answer.headers.get("Content-Length")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise FetchError(f"{redact(answer.url)}: the server sent Content-Length: {text!r:.60}")
        return int(text)

    def _same(self, version: Version) -> None:
        total, pinned = version.total, self._pinned
        if (None not in (pinned, total) and pinned != total) or (total or 0) > MAX_FILE:
            expected = f"at most {MAX_FILE}" if pinned is None else f"pinned at {pinned}"
            raise ArtifactError(f"{redact(self.url)} has {total} bytes, {expected}")
        if self._version is not None and not self._version.same(version):
            raise Changed(f"{redact(self.url)}: the file changed while it was read")
        self._version = version

    def _overrun(self, end: int | None) -> Overrun:
        most = f"{MAX_FILE} bytes, the most a file may have" if end is None else "it announced"
        return Overrun(f"{redact(self.url)}: the server sends more than {most}")

    def _wrong(self, what: str) -> FetchError:
        return FetchError(
            f"{redact(self.url)}: {what}; the server or a proxy before it is broken: use another "
            "address"
        )


class RangeFile(io.RawIOBase):
    """A file on a server, read from stored pieces and by requests.

    `extent` is a range that will be read completely, so that one request serves it. With `keep`,
    fetched bytes are added to `kept`, and a read returns all bytes it asks for.
    """

    def __init__(
        self,
        pieces: RemotePieces,
        kept: dict[int, bytes],
        size: int,
        extent: tuple[int, int] | None,
        keep: bool,
    ) -> None:
        self._pieces, self._kept, self._size, self._keep = pieces, kept, size, keep
        self._extent = extent or (0, 0)
        self._at = 0
        self._stream: Generator[bytes, None, None] | None = None
        self._rest = b""  # unread part of the last chunk
        self._stream_at, self._stream_end = 0, 0

    def close(self) -> None:
        if self._stream is not None:  # closes the connection
            self._stream.close()
        super().close()

    def readable(self) -> bool:
        return True

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

    def readinto(self, buffer: Any) -> int:
        start, stop = self._at, min(self._at + len(buffer), self._size)
        if stop <= start:
            return 0
        for at, piece in self._kept.items():
            # zipfile, which reads without a buffer, takes a short read for the end of the file.
            end = stop if self._keep else start + 1
            if at <= start and end <= at + len(piece):
                data = piece[start - at : stop - at]
                break
        else:
            data = self._fetched(start, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetched(self, start: int, stop: int) -> bytes:
        first, last = self._extent
        end = last if first <= start < last else stop
        if self._keep:
            self._kept[start] = b"".join(self._pieces.stream(start, end))
            return self._kept[start][: stop - start]
        if self._stream is None or start != self._stream_at or start >= self._stream_end:
            if self._stream is not None:
                self._stream.close()
            self._stream, self._rest = self._pieces.stream(start, end), b""
            self._stream_at, self._stream_end = start, end
        chunk = self._rest or next(self._stream, b"")
        data, self._rest = chunk[: stop - start], chunk[stop - start :]
        self._stream_at += len(data)
        return data
