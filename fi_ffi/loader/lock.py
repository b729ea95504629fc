"""`wheels.lock`: the pins."""

from __future__ import annotations

import functools
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import LoaderError

SCHEMA = 1


@dataclass(frozen=True)
class IndexFile:
    """A wheel on the package index, and the one member of it that is wanted."""

    project: str
    version: str
    file: str
    sha256: str
    size: int
    member: str
    member_sha256: str
    provenance: str


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


def this_platform() -> str:
    """The platform's name in the lock, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def lock_path() -> Path:
    """The lock inside the installed package, or in a source tree beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "wheels.lock"
    return inside if inside.exists() else package.parent / "wheels.lock"


@functools.cache
def tvm_ffi_pin() -> TvmFfiPin:
    """The libtvm_ffi section of the lock."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    path = lock_path()
    try:
        data = tomllib.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, not {SCHEMA}")
        section = data["libtvm-ffi"]
        files = {
            entry["platform"]: IndexFile(
                project=section["project"],
                version=section["version"],
                file=entry["file"],
                sha256=entry["sha256"],
                size=entry["size"],
                member=section["member"],
                member_sha256=entry["member-sha256"],
                provenance=entry["provenance"],
            )
            for entry in section["files"]
        }
        return TvmFfiPin(section["version"], section["accepted"], section["member"], files)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise LoaderError(f"{path} is not a readable lock: {error!r}") from error
