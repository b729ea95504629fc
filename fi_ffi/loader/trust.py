"""Ownership checks: files are loaded or run only if this user and root alone can write them.

A loaded library runs with the rights of this process. A file that another user could have placed or
could change is refused, whatever its hash was when it was read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fi_ffi.errors import ArtifactError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_MOVE = "or set FI_FFI_CACHE_DIR to a directory of your own"
_KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "file",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Open a file to read and return its descriptor; `OSError` if it is no regular file."""
    # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file")
    return fd


def folders_exist(root: Path, folder: Path) -> bool:
    """Return whether `folder` and its parents up to the cache's `root` exist; each must be safe."""
    below = folder.relative_to(root).parts
    try:
        check_root(root)
        for depth in range(1, len(below) + 1):
            check_folder(root.joinpath(*below[:depth]))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_root(root: Path) -> None:
    """Raise `ArtifactError` if others can add or replace files directly in the cache."""
    status, real = os.lstat(root), os.path.realpath(root)
    if real in ("/", os.path.realpath(os.path.expanduser("~"))):
        raise ArtifactError(
            f"the cache directory is {root}, which has other files: set FI_FFI_CACHE_DIR to a "
            f"directory of its own, such as {root / 'fi-ffi'}"
        )
    for place in {*root.parents, *Path(real).parents}:
        _check_place(place, os.stat(place), f"nothing in {root} is loaded")
    if stat.S_ISLNK(status.st_mode):  # for example to another disk; the link must be this user's
        _check_owner(root, status, "the link")
        status = os.stat(root)
    _check_owner(root, status, "the cache directory")
    # Even with the sticky bit, others could create `wheels` or other names first.
    if status.st_mode & stat.S_IWOTH:
        raise ArtifactError(
            f"the cache directory {root} can be written by every user "
            f"(mode {_mode(status)}), so nothing in it is loaded: "
            f"`chmod o-w {root}` if only you have used it, {_MOVE}"
        )


def check_folder(folder: str | Path) -> None:
    """Raise `ArtifactError` if others could put files into a folder of the cache."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise ArtifactError(f"{folder} is {_kind(status)}, not a directory: remove it, {_MOVE}")
    _check_owner(folder, status, "the directory")
    if status.st_mode & _OTHERS:
        raise ArtifactError(
            f"the directory {folder} can be written by {_who(status)} (mode {_mode(status)}), "
            f"so nothing in it is loaded: remove it, {_MOVE}"
        )


def check_plain(path: str | Path, status: os.stat_result) -> None:
    """Raise `ArtifactError` unless it is a plain file of this user or root; `status`: its lstat."""
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(
            f"{path} is {_kind(status)}, and the cache uses only files that lie in it: "
            "remove it, and it is made again"
        )
    _check_owner(path, status, "the file")


def check_object(path: str | Path, status: os.stat_result) -> None:
    """Raise `ArtifactError` if others could have written a cached file; `status` is its lstat."""
    check_plain(path, status)
    if status.st_mode & _OTHERS:
        raise ArtifactError(
            f"{path} can be written by {_who(status)} (mode {_mode(status)}) and is not loaded: "
            "remove it, and it is made again"
        )


def check_owner(path: Path) -> None:
    """Raise `ArtifactError` unless the target of the path belongs to this user or root."""
    check_owned(path, os.stat(path))


def check_owned(path: str | Path, status: os.stat_result) -> None:
    """Raise `ArtifactError` unless something with this status belongs to this user or root."""
    _check_owner(path, status, f"the {_kind(status).partition(' ')[2]}")


def check_user_path(path: Path) -> None:
    """Raise `ArtifactError` if every user could change a file, or place it there.

    The user, or FlashInfer, chose the path, so another owner is accepted.
    """
    for place in (path, *path.parents[:2]):
        status = os.stat(place)
        _check_place(place, status, f"{path} is not loaded")
        above = os.stat(place.parent)
        if above.st_mode & stat.S_IWOTH and status.st_uid not in (0, os.geteuid()):
            raise ArtifactError(
                f"{place} was put by user {status.st_uid} where every user can put files, so "
                f"{path} is not loaded: copy it to a directory of your own"
            )


def _check_place(place: Path, status: os.stat_result, consequence: str) -> None:
    # In a directory with the sticky bit, such as /tmp, others cannot replace this user's files.
    safe = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & stat.S_IWOTH and not safe:
        raise ArtifactError(
            f"{place} can be written by every user (mode {_mode(status)}), so {consequence}: "
            f"`chmod o-w {place}`, or use a place that only you can write"
        )


def _check_owner(path: str | Path, status: os.stat_result, what: str) -> None:
    if status.st_uid in (0, os.geteuid()):
        return
    names = f", under {status.st_nlink} names" if stat.S_ISREG(status.st_mode) else ""
    raise ArtifactError(
        f"{what} {path} belongs to user {status.st_uid}{names}, and this process runs as "
        f"user {os.geteuid()}: only its own files and root's are loaded. Remove it, {_MOVE}"
    )


def _who(status: os.stat_result) -> str:
    return "every user" if status.st_mode & stat.S_IWOTH else f"all of group {status.st_gid}"


def _mode(status: os.stat_result) -> str:
    return format(stat.S_IMODE(status.st_mode), "04o")


def _kind(status: os.stat_result) -> str:
    return f"a {_KINDS.get(stat.S_IFMT(status.st_mode), 'device')}"
