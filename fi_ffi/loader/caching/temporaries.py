"""Files being written, and what killed processes left of them.

A temporary's name tells its owner: the machine (and PID namespace, which two
containers of one machine do not share), the process, and when that process
started, since process ids are used again.  It is removed by others only when its
owner has provably ended, or, where that cannot be known from here, after a week
without a write.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.loader.caching import trust

ORPHAN_AGE = 60.0  # seconds; of one whose owner has ended, before a cold start removes it
UNKNOWN_AGE = 7 * 86400.0  # seconds; of one whose owner runs, if it does, on another machine

_NAME = re.compile(r"(?P<node>[0-9a-f]{16})\.(?P<pid>[0-9]+)\.(?P<start>[0-9]+)\.[0-9a-f]{16}")
_TEMPFILE = re.compile(r"tmp[a-z0-9_]{8}")  # the standard library's names


@dataclass(frozen=True)
class Temporary:
    """An open, empty file in the cache's file system."""

    path: Path
    fd: int


@dataclass(frozen=True)
class Leftover:
    """A temporary that nobody writes any more."""

    path: Path
    size: int
    written: float  # when it last was, in seconds since 1970


def make_root(root: Path) -> None:
    """The cache's directory, for this user alone where it is new."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    trust.check_root(root)


def make_folder(folder: Path) -> None:
    """A folder of the cache whose parent is there."""
    # Not what the umask leaves of 0777: a folder that all may write would be refused.
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o755)
    trust.check_folder(folder)


@contextlib.contextmanager
def temporary(root: Path) -> Iterator[Temporary]:
    """A new temporary, removed at the end."""
    make_root(root)
    make_folder(root / "tmp")
    path = new_path(root)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    removed_at_exit.add(path)
    fd = os.open(path, flags, 0o600)
    try:
        yield Temporary(path, fd)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
        removed_at_exit.discard(path)


def _remove_at_exit() -> None:
    for path in [*removed_at_exit]:
        with contextlib.suppress(OSError):
            path.unlink()


# Files of this process that a Ctrl-C between two statements would leave: a file is added
# before it is made, and taken out after it is removed.
removed_at_exit: set[Path] = set()
atexit.register(_remove_at_exit)
os.register_at_fork(after_in_child=removed_at_exit.clear)


def leftovers(root: Path, orphan_age: float = ORPHAN_AGE) -> list[Leftover]:
    """The temporaries that may be removed; `orphan_age` is for those of ended processes."""
    found, node, now = [], _node(), time.time()
    try:
        trust.check_folder(root / "tmp")
        names = os.listdir(root / "tmp")
    except OSError:
        return []
    for name in names:
        path = root / "tmp" / name
        match = _NAME.fullmatch(name)
        if match is None and _TEMPFILE.fullmatch(name) is None:
            continue
        try:
            size, written = _size_and_time(path)
        except OSError:  # its owner has just removed it
            continue
        known = match is not None and match["node"] == node
        if match is not None and known and _runs(int(match["pid"]), int(match["start"])):
            continue
        if now - written >= (orphan_age if known else UNKNOWN_AGE):
            found.append(Leftover(path, size, written))
    return found


def sweep(root: Path) -> None:
    """Remove what ended processes left; a failure to is no reason to stop."""
    for leftover in leftovers(root):
        with contextlib.suppress(OSError):
            remove(leftover.path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; it is no error if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def new_path(root: Path) -> Path:
    """A name in the temporaries' folder that tells this process as the owner."""
    pid = os.getpid()
    node = _node() or secrets.token_hex(8)  # nobody's: then only age tells
    return root / "tmp" / f"{node}.{pid}.{_state(pid)[1]}.{secrets.token_hex(8)}"


def _node() -> str | None:
    """This machine, this boot, this PID namespace; None where it cannot be told.

    Not kept: a process can be forked into another namespace than its parent's.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        where = f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def _runs(pid: int, start: int) -> bool:
    """Whether the process that had this id at that time still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        pass
    state, started = _state(pid)
    return state not in ("Z", "X") and started in (start, 0)


def _state(pid: int) -> tuple[str, int]:
    """A process's state letter and start, in clock ticks since boot; "?", 0 if hidden."""
    try:
        # The name before it, in parentheses, may have spaces and parentheses of its own.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "?", 0


def _size_and_time(path: Path) -> tuple[int, float]:
    status = os.lstat(path)
    size, newest = status.st_size, status.st_mtime
    if stat.S_ISDIR(status.st_mode):
        for inner in path.rglob("*"):
            inner_status = os.lstat(inner)
            size, newest = size + inner_status.st_size, max(newest, inner_status.st_mtime)
    return size, newest
