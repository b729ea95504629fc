"""The directories and RECORDs of remote wheels, kept in the cache by the wheel's sha256."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.loader import cache

_FORMAT = 2


@dataclass(frozen=True)
class Index:
    """Parts of a wheel's bytes by their offset: the zip's directory, and RECORD.

    `verified` tells that they are of a file that had the pinned sha256.
    """

    size: int
    verified: bool
    kept: dict[int, bytes]


def _path(sha256: str) -> Path:
    return cache.cache_root() / "indexes" / f"{sha256}.json"


def load_index(sha256: str) -> Index | None:
    """What was kept; None where there is nothing, or nothing that can be read."""
    data = cache.read_note(_path(sha256), _FORMAT)
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        kept = {int(at): base64.b64decode(piece) for at, piece in data["kept"].items()}
        return Index(int(data["size"]), bool(data["verified"]), kept)
    return None


def store_index(sha256: str, index: Index) -> None:
    """Keep it; where the cache cannot be written it is fetched again next time."""
    kept = {str(at): base64.b64encode(piece).decode() for at, piece in index.kept.items()}
    data = {"size": index.size, "verified": index.verified, "kept": kept}
    cache.write_note(_path(sha256), _FORMAT, data)
