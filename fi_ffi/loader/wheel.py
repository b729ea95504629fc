"""Wheels, read member by member; each member is checked against RECORD.

The checks are the same for a wheel on disk and one on a server (`remote.py`); only the origin of
the bytes differs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast

from fi_ffi.errors import ArtifactError, FiFfiError
from fi_ffi.loader import cache, trust
from fi_ffi.loader.distributions import hex_of

# "record-pinned": RECORD has the sha256 pinned in the lock, which covers every member.
# "file-verified": the whole file had its pinned sha256. "record-unpinned": members match the file's
# own RECORD, for which nothing vouches.
Trust = Literal["record-pinned", "file-verified", "record-unpinned"]

_CHUNK = 1 << 20
# Limits in bytes: of a zip's directory and of RECORD (less than 1 MB each in the largest published
# wheel), and of a member (far more than any kernel module).
MAX_INDEX = 4 << 20
MAX_MEMBER = 4 << 30
# Limit of size to compressed size, for members above 1 MiB. Libraries reach 20, deflate 1032.
_MAX_RATIO, _SMALL = 200, 1 << 20
SLACK = 1024  # bytes of extra fields that a local header may have beyond the directory's
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+-]{1,200}")
# What zipfile raises for files that are none, or are damaged.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    LookupError,
)


class ReadableZip(Protocol):
    """The methods of a file that zipfile uses."""

    def read(self, size: int = ...) -> bytes: ...

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def tell(self) -> int: ...


class WheelReader:
    """A wheel, read member by member.

    `members` has the size of each file, `record` the lines of RECORD, and `trust` says what vouches
    for RECORD. Raises `ArtifactError`, naming the wheel, for anything malformed.
    """

    trust: Trust
    members: dict[str, int]
    record: dict[str, Recorded]
    record_sha256: str
    dist_info: str

    def __init__(self, origin: str, record_sha256: str | None = None) -> None:
        self._origin, self._pinned_record = origin, record_sha256
        self._infos: dict[str, zipfile.ZipInfo] = {}
        self._directory_at = 0  # offset of the zip's directory

    def _open(self, member: str | None) -> AbstractContextManager[ReadableZip]:
        """Open the file; besides the directory, the caller will read a member."""
        raise NotImplementedError

    @property
    def version(self) -> str:
        """The version in the name of the dist-info directory."""
        return self.dist_info.removesuffix(".dist-info").partition("-")[2]

    def extract(self, member: str) -> Path:
        """Extract a member into the cache and return its path; the content matches RECORD."""
        recorded, name = self._recorded(member), safe_name(member, self._origin)
        found = cache.find(recorded.sha256, name)
        if found is not None:
            return found
        origin, chunks = f"{self._origin}: {member}", self._chunks(member, recorded.size)
        return cache.store(chunks, recorded.sha256, name, origin, size=recorded.size)

    def _load(self) -> None:
        """Read the directory and RECORD."""
        try:
            with self._open(None) as file, self._archive(file) as archive:
                infos = archive.infolist()
                self._directory_at = archive.start_dir
        except FiFfiError:
            raise
        except BROKEN as error:
            raise ArtifactError(f"{self._origin} is not a readable wheel: {error}") from error
        check_members(infos, self._origin)
        self._infos = {info.filename: info for info in infos}
        self.members = {name: info.file_size for name, info in self._infos.items()}
        record = self._record_member()
        self.dist_info = record.rpartition("/")[0]
        content = self._read_record(record)
        self.record_sha256 = hashlib.sha256(content).hexdigest()
        if self._pinned_record not in (None, self.record_sha256):
            hashes = f"{self.record_sha256}, pinned is {self._pinned_record}"
            raise ArtifactError(f"{self._origin}: the sha256 of RECORD is {hashes}")
        self.record = parse_record(content, self._origin)

    def _read_record(self, member: str) -> bytes:
        return b"".join(self._chunks(member, self.members[member]))

    def _record_member(self) -> str:
        records = [name for name in self.members if name.endswith(".dist-info/RECORD")]
        if len(records) != 1 or records[0].count("/") != 1:
            raise ArtifactError(f"{self._origin}: {len(records)} RECORD files, expected one")
        if self.members[records[0]] > MAX_INDEX:
            raise ArtifactError(f"{self._origin}: RECORD of {self.members[records[0]]} bytes")
        return records[0]

    def _recorded(self, member: str) -> Recorded:
        recorded, size = self.record.get(member), self.members.get(member)
        if size is None or recorded is None:
            raise ArtifactError(f"{self._origin} has no recorded member {member}")
        if size != recorded.size or size > MAX_MEMBER:
            sizes = f"{size} bytes, {recorded.size} in RECORD, at most {MAX_MEMBER}"
            raise ArtifactError(f"{self._origin}: {member} is of {sizes}")
        return recorded

    def _archive(self, file: ReadableZip) -> zipfile.ZipFile:
        return zipfile.ZipFile(cast(BinaryIO, _Bounded(file)))

    def _chunks(self, member: str, size: int) -> Iterator[bytes]:
        """Yield the content, which must have `size` bytes."""
        self._refuse_bombs(self._infos[member])
        try:
            with (
                self._open(member) as source,
                self._archive(source) as archive,
                archive.open(member) as file,
            ):
                left = size
                while chunk := file.read(min(_CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        raise ArtifactError(f"{self._origin}: {member} is longer than recorded")
                    yield chunk
                if left:
                    raise ArtifactError(f"{self._origin}: {member} is shorter than recorded")
        except FiFfiError:
            raise
        except BROKEN as error:
            raise ArtifactError(f"{self._origin}: {member} cannot be read: {error}") from error

    def _refuse_bombs(self, info: zipfile.ZipInfo) -> None:
        # Decompressors of the other methods have no output limit.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArtifactError(
                f"{self._origin}: {info.filename} is compressed by method {info.compress_type}"
            )
        if info.compress_size > info.file_size + info.file_size // 64 + SLACK:
            sizes = f"{info.compress_size} bytes for a content of {info.file_size}"
            raise ArtifactError(f"{self._origin}: {info.filename} takes {sizes}")
        if info.file_size > max(_SMALL, info.compress_size * _MAX_RATIO):
            sizes = f"{info.file_size} bytes out of {info.compress_size}"
            raise ArtifactError(
                f"{self._origin}: {info.filename} is of {sizes}, which no library is: the "
                "wheel is not what it claims to be, get it from its publisher again"
            )


class Wheel(WheelReader):
    """A wheel file on disk."""

    def __init__(
        self,
        path: Path,
        *,
        record_sha256: str | None = None,
        sha256: str | None = None,
        stored: tuple[Path, cache.State | None] | None = None,
    ) -> None:
        """Open a wheel; with `sha256`, read the whole file and compare it.

        `stored` is the file if it was found in the cache or the seed by the sha256 of the wheel.
        """
        super().__init__(str(path), record_sha256)
        self.path, self._state = path, stored[1] if stored else None
        if sha256 is not None:
            self._state = verify_file(path, sha256)
        is_verified = sha256 is not None or stored is not None
        self.trust = "record-pinned" if record_sha256 else "record-unpinned"
        if is_verified and not record_sha256:
            self.trust = "file-verified"
        self._load()

    def _open(self, member: str | None) -> AbstractContextManager[ReadableZip]:
        return open_same(self.path, self._state)


class _Bounded:
    """Limits each read of a file to the size of a directory."""

    def __init__(self, file: ReadableZip) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        limit = MAX_INDEX + 1 if size is None or size < 0 else size
        data = self._file.read(limit) if limit <= MAX_INDEX + 1 else b""
        if limit > MAX_INDEX + 1 or len(data) > MAX_INDEX:
            raise zipfile.BadZipFile(f"its directory is larger than {MAX_INDEX} bytes")
        return data


def safe_name(member: str, origin: str) -> str:
    """Return the last part of a member's path, if it is a valid file name for the cache."""
    name = member.rpartition("/")[2]
    if not _FILE_NAME.fullmatch(name):
        raise ArtifactError(f"{origin}: {member!r:.200} has no file name that the cache accepts")
    return name


def verify_file(path: Path, sha256: str) -> cache.State:
    """Raise `ArtifactError` unless the file has that sha256; return its state."""
    try:
        found, state = cache.hashed(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if found != sha256:
        raise ArtifactError(f"{path}: sha256 is {found}, pinned is {sha256}")
    return state


def open_same(path: Path, state: cache.State | None) -> BinaryIO:
    """Open a file; raise if its state changed since it was verified (None: not verified)."""
    file = os.fdopen(trust.open_regular(path), "rb")
    if state not in (None, cache.state_of(os.fstat(file.fileno()))):
        file.close()
        raise ArtifactError(f"{path} was replaced or written to after it was verified: try again")
    return file


def check_members(infos: list[zipfile.ZipInfo], origin: str) -> None:
    """Raise `ArtifactError` for links, for names that lead outside, and for duplicate names."""
    seen: set[str] = set()
    for info in infos:
        name, folded = info.orig_filename, info.orig_filename.casefold()
        kind = stat.S_IFMT(info.external_attr >> 16)
        what = None
        if folded in seen:
            what = "has the same name as another member, ignoring case"
        elif name[:1] == "/" or ".." in name.split("/") or {"\\", ":", "\0"} & {*name}:
            what = "leads out of the wheel"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "is no regular file"
        if what:
            raise ArtifactError(
                f"{origin}: the member {name!r:.200} {what}. No proper wheel has that: get it "
                "from its publisher again"
            )
        seen.add(folded)


@dataclass(frozen=True)
class Recorded:
    """A member's sha256 (hex) and size in bytes, from RECORD."""

    sha256: str
    size: int


def parse_record(text: bytes, origin: str) -> dict[str, Recorded]:
    """Return the members that RECORD lists with a sha256 and a size."""
    record: dict[str, Recorded] = {}
    try:
        for row in csv.reader(io.StringIO(text.decode("utf-8"))):
            if len(row) != 3:
                raise ArtifactError(
                    f"{origin}: a line of RECORD has {len(row)} fields: {row!r:.100}"
                )
            name, digest, size = row
            if digest and size:
                if not (size.isascii() and size.isdigit() and len(size) < 19):
                    said = f"RECORD has a size of {size!r:.40} for {name}"
                    raise ArtifactError(f"{origin}: {said}")
                found = Recorded(hex_of(digest, origin, name), int(size))
                if record.setdefault(name, found) != found:
                    raise ArtifactError(f"{origin}: RECORD has two lines for {name!r:.100}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{origin}: RECORD is malformed: {error}") from error
    return record
