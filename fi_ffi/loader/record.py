"""RECORD: what a wheel says of its own members."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from dataclasses import dataclass

from fi_ffi.errors import ArtifactError


@dataclass(frozen=True)
class Recorded:
    """What RECORD says of a member: sha256 (hex) and size in bytes."""

    sha256: str
    size: int


def parse_record(text: bytes, origin: str) -> dict[str, Recorded]:
    """The members that RECORD lists with a sha256 and a size."""
    record: dict[str, Recorded] = {}
    try:
        for row in csv.reader(io.StringIO(text.decode("utf-8"))):
            if len(row) != 3:
                raise ArtifactError(
                    f"{origin}: a line of RECORD has {len(row)} fields: {row!r:.100}"
                )
            name, digest, size = row
            if digest and size:
                found = Recorded(hex_of(digest, origin, name), _size(size, origin, name))
                if record.setdefault(name, found) != found:
                    raise ArtifactError(f"{origin}: RECORD has two lines for {name!r:.100}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{origin}: RECORD is malformed: {error}") from error
    return record


def hex_of(digest: str, origin: str, name: str = "it") -> str:
    """The sha256 of a RECORD's field."""
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
