"""Removing what lies in the cache, and hashing it all again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fi_ffi.errors import ArtifactError
from fi_ffi.loader import cache
from fi_ffi.loader.caching import contents, locking, stamps, temporaries, trust
from fi_ffi.loader.caching.contents import Item


@dataclass(frozen=True)
class Verdict:
    """What hashing an object again has shown; `problem` is empty where it is well."""

    item: Item
    problem: str = ""
    removed: bool = False


@dataclass(frozen=True)
class Pruned:
    """What was removed, and what was to be and was not, with the reason."""

    removed: tuple[Item, ...]
    kept: tuple[tuple[Item, str], ...]

    @property
    def freed(self) -> int:
        return sum(item.size for item in self.removed)


def prune(items: Iterable[Item], root: Path, *, dry_run: bool = False) -> Pruned:
    """Remove the items, but for what a build or a download is at work on.

    A file that a process has loaded stays in its memory; on a network file system
    that holds only for the processes of this machine.
    """
    items = [*items]
    removed: list[Item] = []
    kept: list[tuple[Item, str]] = []
    # All of them: a build uses environments and toolkits that it holds no lock on.
    building = any(item.kind == "build" for item in items)
    locks = [contents.build_lock(folder) for folder in contents.build_folders(root)]
    with _free(locks if building else []) as quiet:
        for item in items:
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
            except OSError as error:
                kept.append((item, error.strerror or str(error)))
    return Pruned(tuple(removed), tuple(kept))


def verify(root: Path, *, repair: bool = False) -> Iterator[Verdict]:
    """Hash every object again, one after the other; with `repair` remove those that fail."""
    if root.is_dir():
        trust.check_root(root)
    for item in contents.objects(root):
        verdict = _verdict(item)
        if verdict.problem and repair:
            verdict = _repair(item, root)
        yield verdict


def _verdict(item: Item) -> Verdict:
    try:
        if cache.find(str(item.sha256), item.name, paranoid=True):
            return Verdict(item)
    except ArtifactError as error:
        return Verdict(item, f"refused: {error}")
    if not os.path.lexists(item.path):  # removed meanwhile, which is no damage
        return Verdict(item)
    if not os.access(item.path, os.R_OK):
        return Verdict(item, "cannot be read")
    return Verdict(item, "damaged: the content does not have this sha256")


def _repair(item: Item, root: Path) -> Verdict:
    """Remove a bad object, unless another process has put a good one there meanwhile."""
    with locking.turn(root, str(item.sha256), lambda: False):
        verdict = _verdict(item)
        if not verdict.problem:
            return verdict
        try:
            _remove(item, root)
        except OSError as error:
            return replace(verdict, problem=f"{verdict.problem} (not removed: {error.strerror})")
        return replace(verdict, removed=True)


def _remove(item: Item, root: Path) -> None:
    if item.kind == "build":
        _remove_build(item.path, root)
        return
    temporaries.remove(item.path)
    if item.kind == "object":
        temporaries.remove(stamps.stamp_path(item.path))
    if item.kind == "download":
        temporaries.remove(item.path.with_suffix(".json"))
    for folder in item.path.parents[:2]:
        # The folders of hashes; the others stay, as they are made once.
        if folder.parent.parent == root or folder.parent.parent.parent == root:
            with contextlib.suppress(OSError):  # others are in it
                folder.rmdir()


def _remove_build(folder: Path, root: Path) -> None:
    """Remove a build folder in one step, as a half of one would not be built again."""
    temporaries.make_folder(root / "tmp")
    aside = temporaries.new_path(root)
    folder.rename(aside)
    for name in (".json", ".log"):
        temporaries.remove(folder.with_name(folder.name + name))
    temporaries.remove(aside)


@contextlib.contextmanager
def _free(locks: Iterable[Path | None]) -> Iterator[bool]:
    """Whether nobody holds any of the locks; nobody gets one before the end."""
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
