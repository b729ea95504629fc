"""The bindings of FlashInfer's modules, read from the sources that its generators list."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.release.exports import EXPORT, Bindings, Source, read

# Include path below `data`, searched after the file's own folder.
_FOLDERS = ("csrc", "include", "csrc/nv_internal", "csrc/nv_internal/include")
# Folders in which a macro might be defined.
_DEFINING = ("csrc", "include", "cutlass/include")
_DEFINE = re.compile(r"#\s*define\s+(\w+)")
_ARCHITECTURE = re.compile(r"code=(sm_\d+[af]?)")


class Reader:
    """Reads modules as `described` returns them; `data` is the folder of FlashInfer's sources.

    `cuda` is the toolkit's CUDA_VERSION, for conditions on it.
    """

    def __init__(self, data: Path, cuda: int = 13000) -> None:
        self.data = data
        self._compiler = {"CUDA_VERSION": str(cuda), "CUDART_VERSION": str(cuda)}

    def bindings(self, module: Mapping[str, Any]) -> Bindings:
        """Return a module's exports."""
        found = (self._source(Path(path), module) for path in module["sources"])
        return read((source for source in found if source), self._include, self.is_switch)

    def files(self, module: Mapping[str, Any]) -> list[str]:
        """Return the exporting sources: below `data`, or the files they are generated from."""
        exporting = [Path(path) for path in module["sources"] if EXPORT in _text(Path(path))]
        return [self._shown(path) for path in exporting]

    def is_switch(self, macro: str) -> bool:
        """Return whether a macro can only be set on the command line."""
        return not macro.startswith("_") and macro not in self._defined

    def _shown(self, path: Path) -> str:
        if path.is_relative_to(self.data):
            return path.relative_to(self.data).as_posix()
        original = next(iter(sorted(self.data.glob(f"csrc/**/{path.name}"))), None)
        return original.relative_to(self.data).as_posix() if original else f"made: {path.name}"

    def _source(self, path: Path, module: Mapping[str, Any]) -> Source | None:
        text = _text(path)
        if EXPORT not in text:
            return None
        flags = module["cuda_cflags"] if path.suffix == ".cu" else module["cflags"]
        return Source(str(path), text, self._compiler | defines(flags))

    def _include(self, path: str, name: str) -> str | None:
        folders = [Path(path).parent, *(self.data / folder for folder in _FOLDERS)]
        found = next((f / name for f in folders if (f / name).is_file()), None)
        return None if found is None else _text(found)

    @functools.cached_property
    def _defined(self) -> frozenset[str]:
        files = (path for folder in _DEFINING for path in (self.data / folder).rglob("*"))
        return frozenset(
            name for path in files if path.is_file() for name in _DEFINE.findall(_text(path))
        )


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def defines(flags: Iterable[str]) -> dict[str, str]:
    """Return the macros set by flags such as `-DNAME` and `-DNAME=1`."""
    pairs = (flag[2:].partition("=") for flag in flags if flag.startswith("-D"))
    return {name: value or "1" for name, _, value in pairs}


def architectures(module: Mapping[str, Any], targets: Iterable[str]) -> tuple[str, ...]:
    """Return a module's architectures: those in its flags, or all `targets`."""
    own = [found[1] for flag in module["cuda_cflags"] if (found := _ARCHITECTURE.search(flag))]
    return tuple(own) if own else tuple(targets)
