"""The cache: files stored under the hash of their content, and notes that save work on them.

  objects/bf/bf69…/norm.so          a file under its sha256, mode 0444
  objects/bf/bf69…/.1ed5f42e.stamp  its state when it was last hashed
  tmp/                              files being written, each locked by its writer
  locks/                            held while a file is made, so that it is made once
  facts/, indexes/, downloads/      notes (JSON), and unfinished downloads
  build/, wheels/                   work folders and results of `fi-ffi build`

Only this user and root may write to the cache: `trust` refuses everything else. A file gets its
name in one step, after it is complete, hashed and synced. It is trusted while its stamp (a line
with its size, times and inode) matches; otherwise it is hashed again. `find` takes no lock and
reads only the stamp. Locks only avoid duplicate work: where they do not work, several processes
make the same file and the first to finish wins. `docs/cache.md` describes the guarantees for killed
processes, full disks and shared directories.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fi_ffi.errors import ArtifactError, LoaderError, let_through
from fi_ffi.loader import trust
from fi_ffi.loader.permission import is_on

ENVIRONMENT = "FI_FFI_CACHE_DIR"
PARANOID = "FI_FFI_PARANOID"
PATIENCE = 300.0  # seconds to wait for a lock whose holder is stopped or lost
USE_GRAIN = 3600.0  # seconds; uses that follow an earlier one sooner are not recorded
ORPHAN_AGE = 60.0  # seconds since a temporary was written, before a cold start removes it
# seconds; the same for a temporary whose writer may run on another machine
UNKNOWN_AGE = 7 * 86400.0

State = tuple[int, int, int, int]  # size, times and inode of a file, from `state_of`

_CHUNK = 1 << 20
_POLL = 0.02
_ATTEMPTS = 8  # retries if a prune keeps removing the folder, or a handle is stale
_MAX_NOTE = 32 << 20  # bytes; several times what the largest directory and RECORD (MAX_INDEX) take
_SHA256 = re.compile("[0-9a-f]{64}")
# Includes the names of earlier releases, whose temporaries are judged by age.
_TEMPORARY = re.compile(r"([0-9a-f]{16})\.[0-9.]*[0-9a-f]{16}|tmp[a-z0-9_]{8}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_thread = threading.local()  # `keys`: the locks that this thread holds


# Location


def cache_root() -> Path:
    """Return `FI_FFI_CACHE_DIR`, or the user's cache directory.

    Raises `LoaderError` if neither is known: a container's user may have no home.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return expanded(chosen, ENVIRONMENT).absolute()
    import platformdirs

    with contextlib.suppress(RuntimeError):
        root = platformdirs.user_cache_path("fi-ffi")
        if root.is_absolute():  # "~" remains if no home directory is known
            return root
    raise LoaderError(
        f"this user has no home directory, so the cache has no place: set {ENVIRONMENT} to a "
        "directory that can be written"
    )


def expanded(path: str | os.PathLike[str], name: str) -> Path:
    """Expand `~` in the user's path; `LoaderError` names `name` if that is impossible."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LoaderError(
            f"{name} is {os.fspath(path)!r:.200}, and this machine knows no such home directory: "
            "name a whole path"
        ) from error


def is_paranoid() -> bool:
    """Return whether `FI_FFI_PARANOID=1`: no stamp is trusted then."""
    return is_on(PARANOID)


def make_root() -> Path:
    """Create the cache's directory and its parents if needed, accessible to this user only."""
    root = cache_root()
    for folder in (*reversed(root.parents), root):
        # Not the mode that the umask leaves: others might then write to the user's `~/.cache`.
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
    trust.check_root(root)
    return root


def make_folder(name: str, *below: str) -> Path:
    """Create and check a folder of the cache and those above it."""
    folder = make_root()
    for part in (name, *below):
        folder /= part
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)
        trust.check_folder(folder)
    return folder


def file_in(folder: str, name: str) -> Path:
    """Create and check a folder of the cache; return the path of a file in it, to be written.

    Raises `ArtifactError` if something is there that is no plain file of this user or root.
    """
    path = make_folder(folder) / name
    with contextlib.suppress(FileNotFoundError):
        trust.check_plain(path, os.lstat(path))
    return path


def object_path(sha256: str, name: str) -> Path:
    """Return the path that the file with this content has in the cache."""
    # Names that begin with a dot are reserved for the cache, and exclude directory names.
    if not _SHA256.fullmatch(sha256) or not name or name[0] == "." or {"/", "\0"} & {*name}:
        raise ArtifactError(f"not a sha256 and a file name: {sha256!r:.80}, {name!r:.80}")
    return cache_root() / "objects" / sha256[:2] / sha256 / name


# Files


def find(sha256: str, name: str, *, paranoid: bool | None = None) -> Path | None:
    """Return the cached file if it exists and has this content.

    It is hashed again if its state changed since the last hash, and always with `paranoid`
    (default: FI_FFI_PARANOID). A damaged file is left for `store` to replace. Raises
    `ArtifactError` if another user could have written the file.
    """
    path = object_path(sha256, name)
    sure = is_paranoid() if paranoid is None else paranoid
    for _ in range(_ATTEMPTS):
        try:
            return path if _is_good(path, sha256, sure) else None
        except OSError as error:
            let_through(error)
            # A network file system: another machine has just replaced the file.
            if error.errno != errno.ESTALE:
                return None
    return None


def _is_good(path: Path, sha256: str, sure: bool) -> bool:
    if not trust.folders_exist(path.parents[3], path.parent):
        return False
    status = os.lstat(path)
    trust.check_object(path, status)
    if not sure and stamp_fits(path, sha256, status):
        return True
    with open(trust.open_regular(path, follow=False), "rb") as file:
        before = os.fstat(file.fileno())
        if hash_of(file) != sha256:
            return False
        after = os.fstat(file.fileno())
    if state_of(before) == state_of(after):  # not written to while it was read
        _keep(stamp_path(path), _stamp(sha256, after))
    return True


@contextlib.contextmanager
def fill_lock(sha256: str, name: str) -> Iterator[Path | None]:
    """Yield the cached file, or None while holding a lock: the caller must then `store` the file.

    Use it for work before `store` that should not be done twice at once, such as a download;
    `store` itself needs no lock.
    """
    found = find(sha256, name)
    if found is not None:
        yield found
        return
    with lock_for(sha256):
        yield find(sha256, name)


def store(
    chunks: Iterable[bytes], sha256: str, name: str, origin: str, *, size: int | None = None
) -> Path:
    """Write the cached file from `chunks`, unless another process wrote it first; return its path.

    Raises `ArtifactError` unless the chunks hash to `sha256`, and `LoaderError` if they cannot be
    written; no partial file remains. `size` is only used in the latter message.
    """
    with fill_lock(sha256, name) as found:
        if found is not None:
            return found
        path = object_path(sha256, name)
        with contextlib.ExitStack() as stack:
            with as_loader_error(path, size):
                make_root()
                sweep()
                new = stack.enter_context(temporary())
            digest = _write(new.fd, path, chunks, size)
            if digest != sha256:
                raise ArtifactError(f"{origin}: sha256 is {digest}, expected {sha256}")
            return adopt(new.path, sha256, name)


def _write(fd: int, path: Path, chunks: Iterable[bytes], size: int | None) -> str:
    digest = hashlib.sha256()
    written = 0
    for chunk in chunks:
        digest.update(chunk)
        left = memoryview(chunk)
        with as_loader_error(path, size, written + len(chunk)):
            while left:
                left = left[os.write(fd, left) :]
        written += len(chunk)
    return digest.hexdigest()


def adopt(source: Path, sha256: str, name: str) -> Path:
    """Move a file of the cache's file system into the cache; return its new path.

    The caller has hashed the content. If a good file already exists, it is kept instead.
    """
    path = object_path(sha256, name)
    with as_loader_error(path, None):
        size = source.stat().st_size
    with as_loader_error(path, size):
        source.chmod(0o444)
        _sync(source, os.O_RDONLY)
        _publish(source, path, sha256)
        with contextlib.suppress(FileNotFoundError):  # a rename already removed it
            source.unlink()
    # After the other name is removed, because that changes the change time.
    with contextlib.suppress(OSError):
        _keep(stamp_path(path), _stamp(sha256, os.lstat(path)))
    return path


def _publish(source: Path, path: Path, sha256: str) -> None:
    """Give the finished file its name in one step."""
    for attempt in range(_ATTEMPTS):
        try:
            make_folder("objects", sha256[:2], sha256)
            _link(source, path, sha256)
            break
        except OSError as error:
            # A prune removed the empty folder, or an NFS server's answer was lost.
            if error.errno not in (errno.ENOENT, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise
    for folder in path.parents[:3]:
        # Not every file system supports this. Without it, a power failure may lose the name.
        with contextlib.suppress(OSError):
            _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _link(source: Path, path: Path, sha256: str) -> None:
    try:
        # Unlike a rename, a link never replaces an existing file. On NFS this process may not see a
        # good file for a minute, and replacing it would remove it under processes of other machines
        # that have it mapped.
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


@contextlib.contextmanager
def as_loader_error(path: Path, size: int | None = None, at_least: int = 0) -> Iterator[None]:
    """Convert an error of writing to a `LoaderError` with advice."""
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
    """Return the bytes that this user may still write at the cache's location."""
    while not root.exists() and root != root.parent:
        root = root.parent
    return shutil.disk_usage(root).free


def hashed(path: Path) -> tuple[str, State]:
    """Return the sha256 of a file that may be anybody's, and its state before it was read."""
    with open(trust.open_regular(path), "rb") as file:
        state = state_of(os.fstat(file.fileno()))
        return hash_of(file), state


def hash_of(file: BinaryIO) -> str:
    """Return the sha256 of an open file's content."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


# Stamps. A stamp is one line that is compared as a whole, so a torn or foreign one only costs a
# hash. Its modification time records the last use.


def state_of(status: os.stat_result) -> State:
    """Return the part of a file's status that stays the same while its content does."""
    # The change time detects a file that was overwritten in place with its size and modification
    # time restored. The device is left out: network and overlay file systems get a new number at
    # every mount.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def stamp_path(path: Path) -> Path:
    """Return the path of an object's stamp, beside the object."""
    # Not derived from the full name: modules' names come close to the limit of 255 bytes.
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.stamp")


def stamp_fits(path: Path, sha256: str, status: os.stat_result) -> bool:
    """Return whether the stamp matches the file's state (its `lstat`), and record the use."""
    try:
        fd = os.open(stamp_path(path), _READ | os.O_NONBLOCK)
        try:
            fits = os.read(fd, 1024) == _stamp(sha256, status)
            if fits and abs(time.time() - os.fstat(fd).st_mtime) > USE_GRAIN:
                try:
                    os.utime(fd)
                except OSError as error:  # a read-only cache
                    let_through(error)
        finally:
            os.close(fd)
    except OSError as error:
        let_through(error)
        return False
    return fits


def _stamp(sha256: str, status: os.stat_result) -> bytes:
    return f"1 {sha256} {' '.join(map(str, state_of(status)))}\n".encode()


# Notes: results that are kept to save time


def read_note(name: str, form: int, root: Path | None = None) -> Any:
    """Return the note of this path below the cache's root (or another) in this format, or None.

    A damaged note, or one that another user could have written, also gives None.
    """
    root = root or cache_root()
    path = root / name
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if not trust.folders_exist(root, path.parent):
            return None
        status = os.lstat(path)
        trust.check_object(path, status)
        if status.st_size <= _MAX_NOTE:
            note = json.loads(path.read_bytes())
            return note["data"] if note["format"] == form else None
    return None


def write_note(name: str, form: int, data: Any) -> None:
    """Write a note; it appears completely or not at all."""
    with contextlib.suppress(OSError, LoaderError):
        make_folder(*Path(name).parent.parts)
        _keep(cache_root() / name, json.dumps({"format": form, "data": data}).encode())


def _keep(path: Path, content: bytes) -> None:
    """Write a file that only saves work; failures are ignored."""
    with contextlib.suppress(OSError, LoaderError), temporary() as new:
        with open(new.fd, "wb", closefd=False) as file:
            file.write(content)
        os.fchmod(new.fd, 0o644)
        os.replace(new.path, path)


# Temporaries and locks


@dataclass(frozen=True)
class Temporary:
    """An open, empty file in the cache's file system."""

    path: Path
    fd: int


@contextlib.contextmanager
def temporary() -> Iterator[Temporary]:
    """Yield a new temporary, locked while it is written and removed at the end."""
    folder = make_folder("tmp")
    path, fd = new_path(folder), -1
    removed_at_exit.add(path)
    try:
        while fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
            with contextlib.suppress(OSError):  # without locks, the file's age decides
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not os.fstat(fd).st_nlink:  # a prune removed it before it was locked
                os.close(fd)
                fd = -1
        yield Temporary(path, fd)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
        removed_at_exit.discard(path)


def new_path(folder: Path) -> Path:
    """Return a new name for a temporary, which identifies the machine and its boot."""
    return folder / f"{_boot()}.{secrets.token_hex(8)}"


def _boot() -> str:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # a boot of nobody, so that only the age decides
        return secrets.token_hex(8)
    return text.replace("-", "")[:16]


def abandoned(path: Path, written: float, age: float = 0.0) -> bool:
    """Return whether no process writes a temporary any more; `written` is its modification time.

    The writer holds a lock on it until it ends, in whatever way.
    """
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    since = abs(time.time() - written)  # a time in the future comes from a wrong clock
    if match[1] != _boot():
        return since >= UNKNOWN_AGE
    if since < age:
        return False
    try:
        fd = os.open(path, _READ | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    except BlockingIOError:
        return False
    except OSError:
        return since >= UNKNOWN_AGE
    return True


def sweep() -> None:
    """Remove leftovers of ended processes; failures are ignored."""
    folder = cache_root() / "tmp"
    with contextlib.suppress(OSError):
        trust.check_folder(folder)
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if abandoned(path, os.lstat(path).st_mtime, ORPHAN_AGE):
                    remove(path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def lock_for(key: str) -> Iterator[None]:
    """Hold the lock of `key`; continue without it after PATIENCE, or if locks do not work.

    The lock is reentrant within a thread.
    """
    keys: set[Path] = _thread.__dict__.setdefault("keys", set())
    path = cache_root() / "locks" / f"{key}.lock"
    with contextlib.ExitStack() as stack:
        # No directory for the lock file, or a file system without locks.
        with contextlib.suppress(OSError, NotImplementedError):
            if path not in keys:
                # Also if it was waited for in vain, so that nothing inside the block waits again.
                keys.add(path)
                stack.callback(keys.discard, path)
                _acquire(path, stack)
        yield


def _acquire(path: Path, stack: contextlib.ExitStack) -> None:
    from filelock import FileLock, Timeout  # its import takes longer than a warm load

    lock = FileLock(file_in("locks", path.name))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        removed_at_exit.add(path)
        try:
            stack.enter_context(lock.acquire(timeout=0))
            # Removed before the release. A process that still has the file open gets a lock that
            # excludes nobody, but then finds the finished file.
            stack.callback(_remove_lock, path)
            return
        except Timeout:
            removed_at_exit.discard(path)  # held by another process
            time.sleep(_POLL)


def _remove_lock(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    removed_at_exit.discard(path)


def _remove_at_exit() -> None:
    for path in [*removed_at_exit]:
        with contextlib.suppress(OSError):
            path.unlink()


# Files of this process that a Ctrl-C between two statements would leave behind. A file is added
# before it is created, and discarded after it is removed.
removed_at_exit: set[Path] = set()
atexit.register(_remove_at_exit)
os.register_at_fork(after_in_child=removed_at_exit.clear)
