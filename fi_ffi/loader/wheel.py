"""Wheels: members taken out one at a time, each checked against RECORD."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import ArtifactError
from fi_ffi.loader import cache

_CHUNK = 1 << 20
_MAX_RECORD = 64 << 20  # bytes; the largest published wheel's RECORD is well under 1 MB
_MAX_MEMBER = 4 << 30
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Recorded:
    """What RECORD says of a member: sha256 (hex) and size in bytes."""

    sha256: str
    size: int


class Wheel:
    """A wheel file on disk, read member by member.

    Raises `ArtifactError`, naming the file, for anything malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {info.filename: info.file_size for info in archive.infolist()}
                records = [n for n in self.members if n.endswith(".dist-info/RECORD")]
                if len(records) != 1:
                    raise ArtifactError(f"{path}: {len(records)} RECORD files, expected one")
                if self.members[records[0]] > _MAX_RECORD:
                    raise ArtifactError(f"{path}: RECORD of {self.members[records[0]]} bytes")
                self.record = parse_record(archive.read(records[0]), str(path))
        except _BROKEN as error:
            raise ArtifactError(f"{path} is not a readable wheel: {error}") from error
        self.dist_info = records[0].rpartition("/")[0]

    @property
    def version(self) -> str:
        """The version in the name of the dist-info directory."""
        return self.dist_info.removesuffix(".dist-info").partition("-")[2]

    def extract(self, member: str) -> Path:
        """The member's file in the cache, its content as RECORD has it."""
        recorded = self.record.get(member)
        if member not in self.members or recorded is None:
            raise ArtifactError(f"{self.path} has no recorded member {member}")
        if self.members[member] != recorded.size or recorded.size > _MAX_MEMBER:
            sizes = f"{self.members[member]} bytes, {recorded.size} in RECORD"
            raise ArtifactError(f"{self.path}: {member} is of {sizes}")
        name = member.rpartition("/")[2]
        found = cache.find(recorded.sha256, name)
        if found is not None:
            return found
        origin = f"{self.path}: {member}"
        return cache.store(self._chunks(member, recorded.size), recorded.sha256, name, origin)

    def _chunks(self, member: str, size: int) -> Iterator[bytes]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                left = size
                while chunk := file.read(min(_CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        raise ArtifactError(f"{self.path}: {member} is longer than recorded")
                    yield chunk
        except _BROKEN as error:
            raise ArtifactError(f"{self.path}: {member} cannot be read: {error}") from error


def parse_record(text: bytes, origin: str) -> dict[str, Recorded]:
    """The members that RECORD lists with a sha256 and a size."""
    try:
        rows = list(csv.reader(io.StringIO(text.decode("utf-8"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{origin}: RECORD is malformed: {error}") from error
    record = {}
    for row in rows:
        if len(row) != 3:
            raise ArtifactError(f"{origin}: a line of RECORD has {len(row)} fields: {row!r:.100}")
        name, digest, size = row
        if digest and size:
            record[name] = Recorded(_hex(digest, origin, name), _size(size, origin, name))
    return record


def _hex(digest: str, origin: str, name: str) -> str:
    algorithm, _, value = digest.partition("=")
    try:
        raw = base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if algorithm != "sha256" or len(raw) != 32:
        raise ArtifactError(f"{origin}: RECORD has no sha256 for {name}: {digest!r:.80}")
    return raw.hex()


def _size(size: str, origin: str, name: str) -> int:
    if not (size.isascii() and size.isdigit() and len(size) < 19):
        raise ArtifactError(f"{origin}: RECORD has a size of {size!r:.40} for {name}")
    return int(size)
