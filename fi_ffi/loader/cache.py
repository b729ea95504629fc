"""The cache: files under the hash of their content.

A file appears under its final name only whole and verified.  Finding one takes no
lock and reads only its stamp; `docs/cache.md` says what holds when processes are
killed, disks are full and directories are shared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader.caching import locking, stamps, temporaries, trust

ENVIRONMENT = "FI_FFI_CACHE_DIR"
PARANOID = "FI_FFI_PARANOID"

_CHUNK = 1 << 20
_ATTEMPTS = 8  # at a folder that a prune keeps removing, or a handle gone stale
_SHA256 = re.compile("[0-9a-f]{64}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def cache_root() -> Path:
    """`FI_FFI_CACHE_DIR`, or the user's cache directory."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("fi-ffi")


def is_paranoid() -> bool:
    """`FI_FFI_PARANOID=1`: no stamp is believed."""
    return os.environ.get(PARANOID) == "1"


def object_path(sha256: str, name: str) -> Path:
    """Where the file with this content lies, if it is there."""
    # Names that begin with a dot are the cache's own, and those of directories.
    if not _SHA256.fullmatch(sha256) or not name or name[0] == "." or {"/", "\0"} & {*name}:
        raise ArtifactError(f"not a sha256 and a file name: {sha256!r:.80}, {name!r:.80}")
    return cache_root() / "objects" / sha256[:2] / sha256 / name


def find(sha256: str, name: str, *, paranoid: bool | None = None) -> Path | None:
    """The cached file, if it is there and has that content.

    It is hashed again where it is not as it was when that was last done, and always
    with `paranoid` (by default as FI_FFI_PARANOID says).  A damaged one is left for
    `store` to replace.  Raises `ArtifactError` where another user could have put it
    there.
    """
    path = object_path(sha256, name)
    sure = is_paranoid() if paranoid is None else paranoid
    for _ in range(_ATTEMPTS):
        try:
            return path if _is_good(path, sha256, sure) else None
        except OSError as error:
            # A network file system: another machine replaced the file just now.
            if error.errno != errno.ESTALE:
                return None
    return None


def _is_good(path: Path, sha256: str, sure: bool) -> bool:
    root = path.parents[3]
    if not trust.folders_exist(root, path.parent):
        return False
    status = os.lstat(path)
    trust.check_object(path, status)
    if not sure and stamps.fits(path, sha256, status):
        return True
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        before = os.fstat(file.fileno())
        if hash_of(file) != sha256:
            return False
        after = os.fstat(file.fileno())
    if stamps.facts(before) == stamps.facts(after):  # nobody wrote while it was read
        stamps.write(root, path, sha256, after)
    return True


@contextlib.contextmanager
def filling(sha256: str, name: str) -> Iterator[Path | None]:
    """The cached file, or None and the duty to `store` it while others wait for it.

    For work that should not be done twice at once and that comes before `store`, such
    as a download; `store` itself needs no such care.
    """
    path = object_path(sha256, name)
    found = find(sha256, name)
    if found is not None:
        yield found
        return
    mine = False
    while not mine:
        with locking.turn(cache_root(), sha256, _replaced(path)) as mine:
            found = find(sha256, name)
            if found is not None or mine:
                yield found
                return


def store(
    chunks: Iterable[bytes], sha256: str, name: str, origin: str, *, size: int | None = None
) -> Path:
    """The cached file, written from `chunks` unless another process wrote it meanwhile.

    Raises `ArtifactError` unless the chunks hash to `sha256`, `LoaderError` where they
    cannot be written; nothing half-written stays.  `size` is only for the latter's
    message.
    """
    with filling(sha256, name) as found:
        if found is not None:
            return found
        path, root = object_path(sha256, name), cache_root()
        with contextlib.ExitStack() as stack:
            with _writing(path, size):
                temporaries.make_root(root)
                temporaries.sweep(root)
                new = stack.enter_context(temporaries.temporary(root))
            digest = _write(new.fd, path, chunks, size)
            if digest != sha256:
                raise ArtifactError(f"{origin}: sha256 is {digest}, expected {sha256}")
            return adopt(new.path, sha256, name)


def adopt(source: Path, sha256: str, name: str) -> Path:
    """The cached file, made of one that lies in the cache's file system and goes away.

    The caller has hashed the content.  Where there is a good file already, that one
    is it.
    """
    path = object_path(sha256, name)
    with _writing(path, None):
        size = source.stat().st_size
    with _writing(path, size):
        source.chmod(0o444)
        _sync(source, os.O_RDONLY)
        _publish(source, path, sha256)
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            source.unlink()
    # After the other name is gone, which the change time tells too.
    with contextlib.suppress(OSError):
        stamps.write(cache_root(), path, sha256, os.lstat(path))
    return path


def _write(fd: int, path: Path, chunks: Iterable[bytes], size: int | None) -> str:
    digest = hashlib.sha256()
    written = 0
    for chunk in chunks:
        digest.update(chunk)
        left = memoryview(chunk)
        with _writing(path, size, written + len(chunk)):
            while left:
                left = left[os.write(fd, left) :]
        written += len(chunk)
    return digest.hexdigest()


def _publish(source: Path, path: Path, sha256: str) -> None:
    """Give the finished file its name, in one step."""
    for attempt in range(_ATTEMPTS):
        try:
            for folder in reversed(path.parents[:3]):
                temporaries.make_folder(folder)
            _link(source, path, sha256)
            break
        except OSError as error:
            # A prune removed the folder when it was empty, or an NFS server's answer was lost.
            if error.errno not in (errno.ENOENT, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise
    for folder in path.parents[:3]:
        # Not every file system can.  The name may then be lost with the power, no more.
        with contextlib.suppress(OSError):
            _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _link(source: Path, path: Path, sha256: str) -> None:
    try:
        # Unlike a rename it never replaces what is there.  On NFS, where this process
        # may not see for a minute that there is a good file, replacing one would take
        # it away from under the processes of other machines that have it mapped.
        os.link(source, path)
    except FileExistsError:
        if find(sha256, path.name) is None:  # damaged
            os.rename(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(source, path)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replaced(path: Path) -> Callable[[], bool]:
    """What tells whether there is another file, or one at last, since this was called."""

    def inode() -> int | None:
        try:
            return os.lstat(path).st_ino
        except OSError:
            return None

    before = inode()
    return lambda: inode() not in (before, None)


@contextlib.contextmanager
def _writing(path: Path, size: int | None, at_least: int = 0) -> Iterator[None]:
    """Tell what cannot be written where, and what to do about it."""
    try:
        yield
    except OSError as error:
        root = cache_root()
        what = f"{path} cannot be written to the cache: {error.strerror or error}"
        if error.errno in _NO_SPACE:
            needed = f"{size:,}" if size is not None else f"at least {at_least:,}"
            raise LoaderError(
                f"{what}. {needed} bytes are needed and {_free(root):,} are free there: make "
                f"room (`fi-ffi cache prune` may), or set {ENVIRONMENT} to another directory"
            ) from error
        if error.errno in _READ_ONLY:
            what += f". {root} can only be read, and lacks the file"
        what += f"; set {ENVIRONMENT} to a directory that can be written"
        raise LoaderError(what) from error


def _free(root: Path) -> int:
    """Bytes this user may still write where the cache is, or would be."""
    while not root.exists() and root != root.parent:
        root = root.parent
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


def hash_of(file: BinaryIO) -> str:
    """The sha256 of an open file's content."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
