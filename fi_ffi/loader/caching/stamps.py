"""Stamps: what a file was like when its content was hashed.

As long as size, times and inode are those in the stamp, the content is taken to
be the same and is not read again.  A stamp is one line and is compared whole, so
a torn or foreign one only costs a hash.  Its own time tells the last use.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from pathlib import Path

from fi_ffi.errors import LoaderError
from fi_ffi.loader.caching.temporaries import temporary

State = tuple[int, int, int, int]  # what `facts` tells of a file
USE_GRAIN = 3600.0  # seconds; uses closer together than that are not written down


def stamp_path(path: Path) -> Path:
    """The stamp of an object, beside it."""
    # Not the name itself: those of modules come close to the 255 bytes that are allowed.
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.stamp")


def fits(path: Path, sha256: str, status: os.stat_result) -> bool:
    """Whether the stamp is of this file as it is (its `lstat`); notes the use."""
    try:
        fd = os.open(stamp_path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if os.read(fd, 1024) != _text(sha256, status):
            return False
        if abs(time.time() - os.fstat(fd).st_mtime) > USE_GRAIN:
            with contextlib.suppress(OSError):  # a cache that is only read from
                os.utime(fd)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def write(root: Path, path: Path, sha256: str, status: os.stat_result) -> None:
    """Keep what the file was like; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError, LoaderError), temporary(root) as new:
        os.write(new.fd, _text(sha256, status))
        os.fchmod(new.fd, 0o644)
        os.rename(new.path, stamp_path(path))


def last_use(path: Path, status: os.stat_result) -> float:
    """When an object was last found, to `USE_GRAIN`; when it was made, if that is unknown."""
    try:
        return os.lstat(stamp_path(path)).st_mtime
    except OSError:
        return status.st_mtime


def facts(status: os.stat_result) -> State:
    """What stays the same while the content does."""
    # The change time shows what the others do not: a file written over in place, with
    # its size and its modification time put back.  The device is left out, as network
    # and overlay file systems get another number at every mount.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _text(sha256: str, status: os.stat_result) -> bytes:
    return f"1 {sha256} {' '.join(map(str, facts(status)))}\n".encode()
