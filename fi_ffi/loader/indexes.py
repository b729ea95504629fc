"""The directories and RECORDs of remote wheels, kept in the cache by the wheel's sha256."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import LoaderError
from fi_ffi.loader import cache
from fi_ffi.loader.caching import temporaries, trust

_FORMAT = 1
_MAX_FILE = 32 << 20  # bytes; twice what may be kept of a wheel


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
    path = _path(sha256)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if not trust.folders_exist(cache.cache_root(), path.parent):
            return None
        status = os.lstat(path)
        trust.check_object(path, status)
        if status.st_size > _MAX_FILE:
            return None
        data = json.loads(path.read_bytes())
        if data["format"] == _FORMAT:
            kept = {int(at): base64.b64decode(piece) for at, piece in data["kept"].items()}
            return Index(int(data["size"]), bool(data["verified"]), kept)
    return None


def store_index(sha256: str, index: Index) -> None:
    """Keep it; where the cache cannot be written it is fetched again next time."""
    kept = {str(at): base64.b64encode(piece).decode() for at, piece in index.kept.items()}
    data = {"format": _FORMAT, "size": index.size, "verified": index.verified, "kept": kept}
    root, path = cache.cache_root(), _path(sha256)
    with contextlib.suppress(OSError, LoaderError), temporaries.temporary(root) as new:
        temporaries.make_folder(path.parent)
        with open(new.fd, "w", closefd=False) as file:
            json.dump(data, file)
        os.fsync(new.fd)
        os.replace(new.path, path)
