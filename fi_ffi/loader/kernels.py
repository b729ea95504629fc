"""Sources of kernels: directories and wheels in the jit-cache layout.

The layout is FlashInfer's: `<module>/<module>.so`, below `flashinfer_jit_cache/jit_cache/` in a
wheel or its installation.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fi_ffi.errors import ArtifactError, KernelNotFoundError
from fi_ffi.loader import cache, seed, trust
from fi_ffi.loader.wheel import Wheel, WheelReader

LAYOUT = "flashinfer_jit_cache/jit_cache"
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_MEMBER = re.compile(r"(?:.*/)?jit_cache/([^/]+)/\1\.so")


@dataclass(frozen=True)
class ModuleFile:
    """A module's .so on disk, and the hash of its content."""

    module: str
    path: Path
    sha256: str
    # The file's state when it was hashed; None for a file in the cache, which has a stamp.
    state: cache.State | None = None


class KernelSource(Protocol):
    """A place that provides modules.

    `version` is the artifact's full version ("0.6.13+cu130"), or None if unknown.
    """

    @property
    def location(self) -> str: ...

    @property
    def version(self) -> str | None: ...

    @property
    def trust(self) -> str:
        """What vouches for its files: docs/wheels-lock.md."""

    def modules(self) -> list[str]:
        """Return the names of its modules, sorted."""

    def file(self, module: str) -> ModuleFile:
        """Return the file of a module that the source has, verified as far as it allows."""


def release_of(source: KernelSource) -> str | None:
    """Return FlashInfer's release: the version without the local part that names CUDA and SMs."""
    return source.version.partition("+")[0] if source.version else None


class KernelDirectory:
    """Modules in a directory: the jit_cache itself, or the folder it is installed in.

    `hashes` are those in the RECORD of the distribution that installed them.
    """

    def __init__(
        self, location: Path, version: str | None = None, hashes: Mapping[Path, str] | None = None
    ) -> None:
        self.location, self._hashes = str(location), hashes
        self.trust = "record-unpinned" if hashes else "unverified"
        candidates = (location, location / "jit_cache", location / LAYOUT)
        self.root = next((root for root in candidates if _modules_in(root)), location)
        self.version = version or self._written_version()

    def modules(self) -> list[str]:
        return _modules_in(self.root)

    def file(self, module: str) -> ModuleFile:
        found = _hashed(module, self.root / module / f"{module}.so")
        recorded = self._hashes.get(found.path) if self._hashes else found.sha256
        if recorded != found.sha256:
            raise ArtifactError(
                f"{found.path}: sha256 is {found.sha256}, and the RECORD of the distribution "
                f"has {recorded or 'none'}: reinstall it, or name {self.root} in FI_FFI_KERNELS "
                "to use it as it is"
            )
        return found

    def _written_version(self) -> str | None:
        for name in ("_build_meta.py", "__init__.py"):
            try:
                found = _VERSION.search((self.root.parent / name).read_text(errors="replace"))
            except OSError:
                continue
            if found:
                return found[1]
        return None


class KernelWheel:
    """A `flashinfer_jit_cache` wheel; members are extracted to the cache, checked by RECORD."""

    def __init__(self, location: str, wheel: WheelReader) -> None:
        self.location = location
        self._wheel = wheel

    @property
    def version(self) -> str | None:
        return self._wheel.version

    @property
    def trust(self) -> str:
        return self._wheel.trust

    @functools.cached_property
    def _members(self) -> dict[str, str]:
        return modules_of(self._wheel.members)

    def modules(self) -> list[str]:
        return sorted(self._members)

    def file(self, module: str) -> ModuleFile:
        found = self.kept(module)
        if found is None:
            member = self._members[module]
            path = self._wheel.extract(member)
            found = ModuleFile(module, path, self._wheel.record[member].sha256)
        return found

    def kept(self, module: str) -> ModuleFile | None:
        """Return a module's file from the cache or the seed cache, or None."""
        recorded = self._wheel.record.get(self._members[module])
        # extracting reports that it is missing
        return None if recorded is None else stored(module, recorded.sha256)


def modules_of(members: Iterable[str]) -> dict[str, str]:
    """Return a wheel's members that are modules, by module name."""
    matches = ((_MEMBER.fullmatch(member), member) for member in members)
    return {match[1]: member for match, member in matches if match}


def stored(module: str, sha256: str) -> ModuleFile | None:
    """Return a wheel's module from the cache or the seed cache, or None."""
    file = seed.find(sha256, f"{module}.so")
    return None if file is None else ModuleFile(module, file[0], sha256, file[1])


class KernelFile:
    """A single library, which is its own only module and which nothing vouches for."""

    version: str | None = None
    trust = "unverified"

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def modules(self) -> list[str]:
        return [self.path.stem]

    def file(self, module: str = "") -> ModuleFile:
        return _hashed(self.path.stem, self.path)


def _hashed(module: str, path: Path) -> ModuleFile:
    """Hash a file that no other user can change."""
    try:
        trust.check_user_path(path)
        return ModuleFile(module, path, *cache.hashed(path))
    except OSError as error:  # a file of /proc can be opened but not read
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def open_source(location: str | os.PathLike[str]) -> KernelSource:
    """Return the source at a path; `KernelNotFoundError` if nothing is there."""
    path = cache.expanded(location, "the source of kernels")
    if os.path.isdir(path):
        return KernelDirectory(path)
    if os.path.isfile(path) and path.suffix == ".whl":
        trust.check_user_path(path)
        return KernelWheel(str(path), Wheel(path))
    if os.path.exists(path):
        raise ArtifactError(f"{path} is neither a directory nor a .whl file")
    raise KernelNotFoundError(f"{path}: there is no such file or directory")


def _modules_in(root: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except OSError:
        return []
    return [name for name in names if (root / name / f"{name}.so").is_file()]
