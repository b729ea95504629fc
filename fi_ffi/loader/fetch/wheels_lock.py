"""`wheels.lock`, which pins every file that may be fetched.

`docs/wheels-lock.md` describes the format; `tools/pins.py` edits the file.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fi_ffi.errors import LoaderError
from fi_ffi.loader import trust
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.lock import ENVIRONMENT, UNREADABLE, lock_path, read_data, unreadable


@dataclass(frozen=True)
class PinnedWheel:
    """A published wheel of kernels.

    `record_sha256`, if known, pins every member without fetching the whole file. `sm` is the only
    architecture of a provider wheel ("sm90a").
    """

    release: str
    cuda: str
    platform: str
    layout: Literal["monolithic", "provider"]
    file: str
    url: str
    sha256: str
    provenance: str
    size: int | None = None
    record_sha256: str | None = None
    sm: str | None = None


@dataclass(frozen=True, eq=False)
class PinnedDistribution:
    """A wheel of another distribution, whose libraries may be fetched.

    Without a `url`, pip says where the package index has it. Entries of a lock that is read again
    are others.
    """

    name: str
    version: str
    platform: str
    file: str
    sha256: str
    record_sha256: str
    size: int
    license: str
    provenance: str
    url: str | None = None


@dataclass(frozen=True)
class Lock:
    """The contents of a lock file."""

    path: Path
    default_release: str
    kernels: tuple[PinnedWheel, ...]
    distributions: tuple[PinnedDistribution, ...] = ()


_Pin = TypeVar("_Pin", PinnedWheel, PinnedDistribution)


def this_platform() -> str:
    """Return the platform's name in the lock, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def own_lock_path() -> Path | None:
    """Return the lock in the user's cache, which `fi-ffi lock add` writes; None without a cache."""
    try:
        return cache_root() / "wheels.lock"
    except LoaderError:  # a user without a home directory
        return None


def lock_in_use() -> Lock:
    """Read the lock that FI_FFI_LOCK names, or the package's with the user's own pins before it.

    Raises `ArtifactError` if others could write the user's lock.
    """
    lock, own = read_lock(lock_path()), own_lock_path()
    if os.environ.get(ENVIRONMENT) or own is None or not os.path.lexists(own):
        return lock
    trust.check_root(own.parent)
    trust.check_object(own, os.lstat(own))
    mine = read_lock(own, lock)
    return replace(
        lock,
        kernels=(*mine.kernels, *lock.kernels),
        distributions=(*mine.distributions, *lock.distributions),
    )


@functools.cache
def the_lock() -> Lock:
    """Return the lock in use, read once."""
    return lock_in_use()


def read_lock(path: Path, above: Lock | None = None) -> Lock:
    """Read a lock; `LoaderError` names the file and the problem.

    A user's own lock is read with the one `above` it, whose default it does not repeat. Its entries
    have addresses.
    """
    data = read_data(path)
    try:
        kernels = data["kernels"]
        wheels = [
            _pin(PinnedWheel, e | {"url": _url(kernels, e)}) for e in kernels.get("files", [])
        ]
        others = [_pin(PinnedDistribution, entry) for entry in data.get("distributions", [])]
        default = kernels["default"] if above is None else above.default_release
        return Lock(path, default, tuple(wheels), tuple(others))
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _url(kernels: dict[str, Any], entry: dict[str, Any]) -> str:
    """Return an entry's own address, or the one that the lock's pattern gives."""
    from urllib.parse import quote

    if "url" in entry:
        return str(entry["url"])
    url: str = kernels["url"].format(release=entry["release"], file=quote(entry["file"]))
    return url


def _pin(kind: type[_Pin], entry: dict[str, Any]) -> _Pin:
    """Return an entry of the lock: `-` in keys becomes `_`, unknown keys are refused."""
    values = {key.replace("-", "_"): value for key, value in entry.items()}
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in {entry!r:.200}")
    for name in ("sha256", "record_sha256"):
        digest = values.get(name)
        if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise ValueError(f"{name} of {values.get('file')} is no lower-case sha256")
    return kind(**values)
