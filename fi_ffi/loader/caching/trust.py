"""Whose files the cache loads: this user's and root's, where nobody else can write.

A library that is loaded runs with the rights of this process, so a file that
somebody else could have put there or could change is refused, whatever its hash
was when it was looked at.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fi_ffi.errors import ArtifactError

_MOVE = "or set FI_FFI_CACHE_DIR to a directory of your own"


def folders_exist(root: Path, folder: Path) -> bool:
    """Whether `folder` and all above it, up to `root`, are there; each must be safe."""
    below = folder.relative_to(root).parts
    try:
        check_root(root)
        for depth in range(1, len(below) + 1):
            check_folder(root.joinpath(*below[:depth]))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_root(root: Path) -> None:
    """`ArtifactError` where others can replace what lies directly in the cache."""
    status = os.lstat(root)
    if stat.S_ISLNK(status.st_mode):  # to another disk, say; but then by this user
        _check_owner(root, status, "the link")
        status = os.stat(root)
    _check_owner(root, status, "the cache directory")
    # With the sticky bit, as /tmp has it, others can add files and not replace ours.
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise ArtifactError(
            f"the cache directory {root} can be written by every user "
            f"(mode {_mode(status)}), so nothing in it is loaded: "
            f"`chmod o-w {root}` if only you have used it, {_MOVE}"
        )


def check_folder(folder: Path) -> None:
    """`ArtifactError` where others could put files into a folder of the cache."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise ArtifactError(f"{folder} is {_kind(status)}, not a directory: remove it, {_MOVE}")
    _check_owner(folder, status, "the directory")
    if status.st_mode & stat.S_IWOTH:
        raise ArtifactError(
            f"the directory {folder} can be written by every user (mode {_mode(status)}), "
            f"so nothing in it is loaded: remove it, {_MOVE}"
        )


def check_object(path: Path, status: os.stat_result) -> None:
    """`ArtifactError` where a cached file (its `lstat`) could be another user's work."""
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(
            f"{path} is {_kind(status)}, and the cache loads only files that lie in it: "
            "remove it, and it is made again"
        )
    _check_owner(path, status, "the file")
    if status.st_mode & stat.S_IWOTH:
        raise ArtifactError(
            f"{path} can be written by every user (mode {_mode(status)}) and is not loaded: "
            "remove it, and it is made again"
        )


def _check_owner(path: Path, status: os.stat_result, what: str) -> None:
    if status.st_uid in (0, os.geteuid()):
        return
    names = f", under {status.st_nlink} names" if stat.S_ISREG(status.st_mode) else ""
    raise ArtifactError(
        f"{what} {path} belongs to user {status.st_uid}{names}, and this process runs as "
        f"user {os.geteuid()}: only its own files and root's are loaded. Remove it, {_MOVE}"
    )


def _mode(status: os.stat_result) -> str:
    return format(stat.S_IMODE(status.st_mode), "04o")


def _kind(status: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")
