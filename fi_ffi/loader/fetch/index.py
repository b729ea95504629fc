"""What is stored of a wheel on a server, so that a later start asks for less of it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any

from fi_ffi.errors import ArtifactError
from fi_ffi.loader import cache, seed
from fi_ffi.loader.wheel import Recorded, parse_record

_NOTE = "indexes/{}.json"  # by the sha256 of the wheel
_INDEX_FORMAT = 4  # version of the stored indexes' format


@dataclass(frozen=True)
class Index:
    """What is stored of a wheel on a server: RECORD, and the bytes of the zip's directory.

    `pieces` are parts of the file by offset, `size` is the size of the whole.
    """

    size: int
    pieces: dict[int, bytes]
    record: str = ""

    @classmethod
    def load(cls, sha256: str) -> Index | None:
        """Return the index of a wheel; None if there is none, or if it is unreadable."""
        data = _read_note(_NOTE.format(sha256))
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            pieces = {int(at): base64.b64decode(piece) for at, piece in data["pieces"].items()}
            return cls(int(data["size"]), pieces, str(data["record"]))
        return None

    def store(self, sha256: str) -> None:
        """Store it; if the cache cannot be written, it is fetched again next time."""
        pieces = {str(at): base64.b64encode(piece).decode() for at, piece in self.pieces.items()}
        data = {"size": self.size, "pieces": pieces, "record": self.record}
        cache.write_note(_NOTE.format(sha256), _INDEX_FORMAT, data)


def _read_note(name: str) -> Any:
    """Return a note of the cache, or else its counterpart in the seed, or None."""
    note = cache.read_note(name, _INDEX_FORMAT)
    root = seed.seed_root() if note is None else None
    return note if root is None else cache.read_note(name, _INDEX_FORMAT, root)


def stored_record(sha256: str, record_sha256: str | None) -> dict[str, Recorded] | None:
    """Return RECORD of a wheel as it was stored; None unless it is the pinned one, if any."""
    index = Index.load(sha256)
    text = index.record.encode() if index else b""
    if not text or record_sha256 not in (None, hashlib.sha256(text).hexdigest()):
        return None
    with contextlib.suppress(ArtifactError):  # damaged
        return parse_record(text, str(cache.cache_root() / _NOTE.format(sha256)))
    return None
