"""Sources of kernels: a directory or a wheel in the jit-cache layout.

The layout is FlashInfer's: `<module>/<module>.so`, in a wheel (and where one is
installed) below `flashinfer_jit_cache/jit_cache/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from fi_ffi.errors import ArtifactError, KernelNotFoundError
from fi_ffi.loader.wheel import Wheel

LAYOUT = "flashinfer_jit_cache/jit_cache"
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)


class KernelSource(Protocol):
    """Where modules come from.  `release` is FlashInfer's, or None where nothing tells."""

    location: Path
    release: str | None

    def modules(self) -> list[str]:
        """The names of the modules it has, sorted."""

    def path(self, module: str) -> Path:
        """A module's .so, verified as far as the source allows."""


class KernelDirectory:
    """Modules lying in a directory: the jit_cache itself, or what it is installed in."""

    def __init__(self, location: Path) -> None:
        self.location = location
        candidates = (location, location / "jit_cache", location / LAYOUT)
        self._root = next((root for root in candidates if _modules_in(root)), location)
        self.release = self._release()

    def modules(self) -> list[str]:
        return _modules_in(self._root)

    def path(self, module: str) -> Path:
        path = self._root / module / f"{module}.so"
        if module not in self.modules():
            raise _no_module(self, module)
        return path

    def _release(self) -> str | None:
        for name in ("_build_meta.py", "__init__.py"):
            try:
                found = _VERSION.search((self._root.parent / name).read_text(errors="replace"))
            except OSError:
                continue
            if found:
                return found[1]
        return None


class KernelWheel:
    """A `flashinfer_jit_cache` wheel; members go into the cache, checked against RECORD."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self._wheel = Wheel(location)
        self.release: str | None = self._wheel.version

    def modules(self) -> list[str]:
        found = []
        for member in self._wheel.members:
            if member.startswith(LAYOUT + "/") and member.count("/") == 3:
                module = member.split("/")[2]
                if member.endswith(f"/{module}.so"):
                    found.append(module)
        return sorted(found)

    def path(self, module: str) -> Path:
        if module not in self.modules():
            raise _no_module(self, module)
        return self._wheel.extract(f"{LAYOUT}/{module}/{module}.so")


def open_source(location: str | os.PathLike[str]) -> KernelSource:
    """The source at a path; `KernelNotFoundError` where there is nothing of the kind."""
    path = Path(location).expanduser()
    if path.is_dir():
        return KernelDirectory(path)
    if path.is_file() and path.suffix == ".whl":
        return KernelWheel(path)
    if path.exists():
        raise ArtifactError(f"{path} is neither a directory nor a .whl file")
    raise KernelNotFoundError(f"{path}: there is no such file or directory")


def _modules_in(root: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except OSError:
        return []
    return [name for name in names if (root / name / f"{name}.so").is_file()]


def _no_module(source: KernelSource, module: str) -> KernelNotFoundError:
    names = source.modules()
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return KernelNotFoundError(
        f"{source.location} has no module {module!r}; it has: {listed or 'none'}. "
        f"`fi-ffi build {module}` makes one from FlashInfer's sources."
    )
