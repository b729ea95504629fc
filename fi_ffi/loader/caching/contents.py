"""What lies in the cache.

Only what fi_ffi is known to make there is looked at: the directory is the user's
choice, and may have other things in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fi_ffi.errors import LoaderError
from fi_ffi.loader.caching import stamps, temporaries

Kind = Literal["object", "build", "download", "note", "leftover"]

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Item:
    """A file or a folder in the cache.  `last_use` is in seconds since 1970."""

    kind: Kind
    name: str
    path: Path
    size: int
    last_use: float
    sha256: str | None = None


def objects(root: Path) -> list[Item]:
    """The cached files, by name."""
    found: list[Item] = []
    for folder in _object_folders(root):
        paths = [path for path in _entries(folder) if not path.name.startswith(".")]
        found += _items("object", paths, stamps.last_use, folder.name)
    return sorted(found, key=lambda item: (item.name, item.sha256))


def builds(root: Path) -> list[Item]:
    """What `fi-ffi build` has put under `build`."""
    weighed = ((folder, *_weigh(folder)) for folder in build_folders(root))
    return [Item("build", folder.name, folder, size, newest) for folder, size, newest in weighed]


def downloads(root: Path) -> list[Item]:
    """Unfinished downloads, which go on where they stopped."""
    return _items("download", [p for p in _entries(root / "downloads") if p.suffix == ".part"])


def notes(root: Path) -> list[Item]:
    """What was read out of kernel files and of remote wheels, and kept to save time."""
    paths = [path for folder in _folders([root / "facts"]) for path in _entries(folder)]
    paths += _entries(root / "indexes")
    return _items("note", [path for path in paths if path.suffix == ".json"])


def leftovers(root: Path) -> list[Item]:
    """What killed processes left: temporaries, and stamps whose file is gone."""
    found = [
        Item("leftover", left.path.name, left.path, left.size, left.written)
        for left in temporaries.leftovers(root, orphan_age=0.0)
    ]
    for folder in _object_folders(root):
        paths = _entries(folder)
        known = {stamps.stamp_path(path) for path in paths}
        orphans = [path for path in paths if path.suffix == ".stamp" and path not in known]
        found += _items("leftover", orphans)
    return found


def total(root: Path) -> int:
    """Bytes in all files of the cache."""
    return _weigh(root)[0] if root.is_dir() else 0


def unused_since(items: Iterable[Item], days: float) -> list[Item]:
    """Those that were last used that many days ago, or before."""
    limit = time.time() - days * 86400
    return [item for item in items if item.last_use <= limit]


def build_folders(root: Path) -> Iterator[Path]:
    """The builder's folders: it marks each of them with a lock."""
    return (folder for folder in _folders([root / "build"]) if build_lock(folder) is not None)


def build_lock(folder: Path) -> Path | None:
    """The builder's lock inside a folder, or beside it."""
    candidates = (folder / ".lock", folder.with_name(f"{folder.name}.json.lock"))
    return next((path for path in candidates if path.is_file()), None)


def _written(path: Path, status: os.stat_result) -> float:
    return status.st_mtime


def _items(
    kind: Kind,
    paths: Iterable[Path],
    last_use: Callable[[Path, os.stat_result], float] = _written,
    sha256: str | None = None,
) -> list[Item]:
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            status = os.lstat(path)
            use = last_use(path, status)
            found.append(Item(kind, path.name, path, status.st_size, use, sha256))
    return found


def _object_folders(root: Path) -> Iterator[Path]:
    for folder in _folders(_folders([root / "objects"])):
        if _SHA256.fullmatch(folder.name) and folder.parent.name == folder.name[:2]:
            yield folder


def _folders(parents: Iterable[Path]) -> Iterator[Path]:
    """The folders in some folders; links are not followed."""
    for parent in parents:
        for path in _entries(parent):
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    yield path


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LoaderError(f"{folder} cannot be read: {error.strerror}") from error


def _weigh(folder: Path) -> tuple[int, float]:
    """The bytes in a folder's files, and when something in it was last written."""
    size, newest = 0, 0.0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                status = os.lstat(os.path.join(parent, name))
                size += status.st_size
                if not name.endswith(".lock"):  # which only looking at it may touch
                    newest = max(newest, status.st_mtime)
    return size, newest
