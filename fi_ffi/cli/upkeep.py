"""Maintenance of the cache: listing, pruning, and verifying.

Only files that fi_ffi is known to create are touched: the user chose the directory and may keep
other files in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import cache, trust

Kind = Literal["object", "wheel", "build", "download", "note", "leftover"]

_SHA256 = "[0-9a-f]{64}"
_OBJECTS = ("objects", "[0-9a-f]{2}", _SHA256)
# Patterns of folder and file names, starting at the cache's directory.
_PLACES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "object": ((*_OBJECTS, "[^.].*"),),
    "wheel": (("wheels", r".*\.whl"),),
    "build": (("build", ".*"),),
    "download": (("downloads", rf"{_SHA256}\.part"),),
    "note": (
        ("facts", "[0-9a-f]{2}", rf"{_SHA256}\.json"),
        ("indexes", rf"{_SHA256}\.json"),
        ("sources", rf"({_SHA256}|release-[0-9][0-9a-z.]*)\.json"),
    ),
    "leftover": (("tmp", ".*"), (*_OBJECTS, r"\..*\.stamp")),
}


@dataclass(frozen=True)
class Item:
    """A file or a folder in the cache; `last_use` is in seconds since 1970."""

    kind: Kind
    name: str
    path: Path
    size: int
    last_use: float
    sha256: str | None = None


class Verification(NamedTuple):
    """The result of hashing an object again; `problem` is empty if the object is good."""

    item: Item
    problem: str = ""
    removed: bool = False


def items(root: Path, kind: Kind) -> list[Item]:
    """Return all items of a kind, by name.

    "object": a cached file; "wheel": a wheel of kernels, built or the user's own; "build": a folder
    of `fi-ffi build`; "download": an unfinished download; "note": a stored result; "leftover": a
    temporary of a killed process, or a stamp without its file.
    """
    result = []
    for place in _PLACES[kind]:
        for path in _matching(root, *place):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                item = _item(kind, path)
                if item is not None:
                    result.append(item)
    return sorted(result, key=lambda item: (item.name, str(item.path)))


def total(root: Path) -> int:
    """Return the bytes in all files of the cache."""
    return _weigh(root)[0] if os.path.isdir(root) else 0


def _item(kind: Kind, path: Path) -> Item | None:
    """Return the item at a path, or None if it is not of the kind."""
    status = os.lstat(path)
    is_folder = stat.S_ISDIR(status.st_mode)
    size, written = _weigh(path) if is_folder else (status.st_size, status.st_mtime)
    sha256 = None
    if kind == "object":
        sha256 = path.parent.name
        if path.parents[1].name != sha256[:2]:
            return None
        with contextlib.suppress(OSError):
            written = os.lstat(cache.stamp_path(path)).st_mtime
    elif kind == "build":
        # the builder puts a lock into each of its folders
        if not is_folder or _build_lock(path) is None:
            return None
    elif kind in ("download", "note"):
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
    elif kind == "leftover":
        if status.st_uid != os.geteuid():
            return None
        if path.suffix == ".stamp":
            others = _matching(path.parent, "[^.].*")
            if any(cache.stamp_path(other) == path for other in others):
                return None
        elif not cache.abandoned(path, written):
            return None
    # A wrong clock can have left any time.
    return Item(kind, path.name, path, size, max(0.0, min(written, time.time())), sha256)


def _matching(folder: Path, *names: str) -> Iterator[Path]:
    """Yield the paths below a folder whose parts match the patterns; links are not followed."""
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise LoaderError(f"{folder} cannot be read: {error.strerror}") from error
    for path in entries:
        if re.fullmatch(names[0], path.name, re.DOTALL):
            if len(names) == 1:
                yield path
            elif path.is_dir() and not path.is_symlink():
                yield from _matching(path, *names[1:])


def _weigh(folder: Path) -> tuple[int, float]:
    """Return the bytes in a folder's files, and the time of the last write in it."""
    size, newest = 0, 0.0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                status = os.lstat(os.path.join(parent, name))
                size += status.st_size
                if not name.endswith(".lock"):  # looking at a folder may touch its lock
                    newest = max(newest, status.st_mtime)
    return size, newest


def _build_lock(folder: Path) -> Path | None:
    """Return the builder's lock inside a folder, or beside it."""
    candidates = (folder / ".lock", folder.with_name(f"{folder.name}.json.lock"))
    return next((path for path in candidates if path.is_file()), None)


def prune(
    wanted: Iterable[Item], root: Path, *, dry_run: bool = False
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Remove the items, except those used by a running build or download.

    Returns the removed items, and the kept ones with the reason. A loaded file stays in its
    process's memory; on a network file system this holds only for processes of this machine.
    """
    wanted = [*wanted]
    removed: list[Item] = []
    kept: list[tuple[Item, str]] = []
    # All builds' locks: a build uses environments and toolkits without locking them.
    building = any(item.kind == "build" for item in wanted)
    locks = [_build_lock(folder) for folder in _matching(root, "build", ".*")] if building else []
    with _free(locks) as quiet:
        for item in wanted:
            if item.kind == "build" and not quiet:
                kept.append((item, "a build is running"))
                continue
            lock = item.path.with_suffix(".lock") if item.kind == "download" else None
            try:
                with _free([lock]) as free:
                    if not free:
                        kept.append((item, "it is being fetched"))
                        continue
                    if not dry_run:
                        _remove(item, root)
                removed.append(item)
            except (OSError, LoaderError) as error:
                kept.append((item, getattr(error, "strerror", None) or str(error)))
    return removed, kept


def verify(root: Path, *, repair: bool = False) -> Iterator[Verification]:
    """Hash every object again and yield the results; with `repair`, remove those that fail."""
    if os.path.isdir(root):
        trust.check_root(root)
    for item in items(root, "object"):
        verdict = _verdict(item)
        if verdict.problem and repair:
            verdict = _repair(item, root)
        yield verdict


def _verdict(item: Item) -> Verification:
    try:
        if cache.find(str(item.sha256), item.name, paranoid=True):
            return Verification(item)
    except ArtifactError as error:
        return Verification(item, f"refused: {error}")
    if not os.path.lexists(item.path):  # removed meanwhile, hence not damaged
        return Verification(item)
    if not os.access(item.path, os.R_OK):
        return Verification(item, "cannot be read")
    return Verification(item, "damaged: the content does not have this sha256")


def _repair(item: Item, root: Path) -> Verification:
    """Remove a bad object, unless another process has replaced it by a good one meanwhile."""
    with cache.lock_for(str(item.sha256)):
        verdict = _verdict(item)
        if not verdict.problem:
            return verdict
        try:
            _remove(item, root)
        except OSError as error:
            return verdict._replace(problem=f"{verdict.problem} (not removed: {error.strerror})")
        return verdict._replace(removed=True)


def _remove(item: Item, root: Path) -> None:
    path = item.path
    if item.kind == "build":
        # Renamed first, in one step: a half-removed folder would not be built again.
        aside = cache.new_path(cache.make_folder("tmp"))
        path.rename(aside)
        for name in (".json", ".log"):
            cache.remove(path.with_name(path.name + name))
        path = aside
    cache.remove(path)
    if item.kind == "object":
        cache.remove(cache.stamp_path(path))
    for folder in path.parents[:2]:
        # Only the folders named by hashes; the others are permanent.
        if root in (folder.parent.parent, folder.parent.parent.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def _free(locks: Iterable[Path | None]) -> Iterator[bool]:
    """Yield whether all locks are free, and hold them until the block ends."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        try:
            for lock in locks:
                if lock is not None:
                    stack.enter_context(FileLock(lock).acquire(timeout=0))
            free = True
        except (Timeout, OSError, NotImplementedError):
            free = False
        yield free
