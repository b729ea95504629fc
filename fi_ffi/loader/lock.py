"""`wheels.lock`: every file that may be fetched, pinned.

`docs/wheels-lock.md` describes the format.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from fi_ffi.errors import LoaderError

SCHEMA = 1
ENVIRONMENT = "FI_FFI_LOCK"


@dataclass(frozen=True)
class IndexFile:
    """A wheel on the package index, and the one member of it that is wanted."""

    project: str
    version: str
    member: str
    platform: str
    file: str
    sha256: str
    size: int
    member_sha256: str
    provenance: str
    record_sha256: str | None = None


@dataclass(frozen=True)
class KernelFile:
    """A published wheel of kernels.

    `record_sha256`, where known, pins every member without fetching the whole file;
    `sm` is the architecture of a provider wheel ("sm90a"), which holds no other.
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


@dataclass(frozen=True)
class TvmFfiPin:
    """libtvm_ffi: the pinned files by platform, and the installed versions accepted."""

    version: str
    accepted: str
    member: str
    files: dict[str, IndexFile]

    def file_for_this_machine(self) -> IndexFile:
        name = this_platform()
        if name not in self.files:
            raise LoaderError(f"wheels.lock pins no libtvm_ffi for {name}, only {[*self.files]}")
        return self.files[name]


@dataclass(frozen=True)
class Lock:
    """The lock, read."""

    path: Path
    libtvm_ffi: TvmFfiPin
    default_release: str
    kernels: tuple[KernelFile, ...]


def this_platform() -> str:
    """The platform's name in the lock, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def lock_path() -> Path:
    """`FI_FFI_LOCK`, or the lock inside the installed package, or beside a source tree."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser()
    package = Path(__file__).resolve().parent.parent
    inside = package / "wheels.lock"
    return inside if inside.exists() else package.parent / "wheels.lock"


@functools.cache
def the_lock() -> Lock:
    """The lock in use, read once."""
    return read_lock(lock_path())


def tvm_ffi_pin() -> TvmFfiPin:
    """The libtvm_ffi section of the lock in use."""
    return the_lock().libtvm_ffi


def read_lock(path: Path) -> Lock:
    """Read a lock; `LoaderError` names the file and what is wrong with it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    try:
        data = tomllib.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, not {SCHEMA}")
        kernels = data["kernels"]
        files = [
            _entry(KernelFile, {"url": _url(kernels, entry)} | entry)
            for entry in kernels.get("files", [])
        ]
        return Lock(path, _tvm_ffi(data["libtvm-ffi"]), kernels["default"], tuple(files))
    except (OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise LoaderError(f"{path} is not a readable lock: {error!r}") from error


def _tvm_ffi(section: dict[str, Any]) -> TvmFfiPin:
    common = {name: section[name] for name in ("project", "version", "member")}
    files = [_entry(IndexFile, common | entry) for entry in section["files"]]
    by_platform = {file.platform: file for file in files}
    return TvmFfiPin(section["version"], section["accepted"], section["member"], by_platform)


def _url(kernels: dict[str, Any], entry: dict[str, Any]) -> str:
    from urllib.parse import quote

    url: str = kernels["url"].format(release=entry["release"], file=quote(entry["file"]))
    return url


_T = TypeVar("_T", IndexFile, KernelFile)


def _entry(kind: type[_T], entry: dict[str, Any]) -> _T:
    """A dataclass from a table: `-` in keys is `_` in fields, and nothing may be unknown."""
    values = {key.replace("-", "_"): value for key, value in entry.items()}
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in {entry!r:.200}")
    for name in ("sha256", "record_sha256", "member_sha256"):
        digest = values.get(name)
        if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise ValueError(f"{name} of {values.get('file')} is no lower-case sha256")
    return kind(**values)
