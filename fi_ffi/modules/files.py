"""Libraries at a path, each loaded once."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from fi_ffi.abi.function import probe
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, KernelNotFoundError
from fi_ffi.loader import cache, runtime
from fi_ffi.loader.kernels import KernelSource, ModuleFile, facts_of, hashed_file
from fi_ffi.loader.runtime import Loaded

_RECORDS = Path(__file__).with_name("published.json")
# By path, inode, size and modification time.
_files: dict[tuple[Path, int, int, int], Loaded] = {}
_members: dict[tuple[Path, str], Loaded] = {}  # by path and sha256


@functools.cache
def _records() -> dict[str, dict[str, Any]]:
    return json.loads(_RECORDS.read_text())  # type: ignore[no-any-return]


def recorded(sha256: str) -> dict[str, Any] | None:
    """Return the signatures that a published library told on a GPU, by its hash: a library that
    needs the driver's cannot be loaded without it.
    """
    return _records().get(sha256)


def recorded_as(library: str) -> dict[str, Any] | None:
    """Return the same by the library's name, as in "tokenspeed-kernel 0.1.4: routing"."""
    return next((one for one in _records().values() if one["library"] == library), None)


def as_recorded(signature: Signature) -> str:
    """Return a signature as the records have it: types without names."""
    return f"({', '.join(signature.params)}) -> {signature.result}"


class KernelFile:
    """A single library, which is its own only module and which nothing vouches for."""

    version: str | None = None
    distribution = ""
    trust = "unverified"

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def modules(self) -> list[str]:
        return [self.path.stem]

    def file(self, module: str = "") -> ModuleFile:
        return hashed_file(self.path.stem, self.path)


def load_file(path: str | os.PathLike[str]) -> Loaded:
    """Load the library at a path, once; its owner does not matter."""
    where = cache.expanded(path, "the library")
    try:
        where = where.resolve()
        stat = where.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KernelNotFoundError(f"{str(where)!r:.200}: {reason}") from error
    if not where.is_file():
        raise KernelNotFoundError(f"{where} is no file")
    # identifies the file that is there now
    key = (where, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    with runtime.lock_of(where):
        if key not in _files:
            source = KernelFile(where)
            file = source.file()
            _files[key] = runtime.prepare_and_load(source, file, facts_of(file), None)
        return _files[key]


def load_member(source: KernelSource, file: ModuleFile) -> Loaded:
    """Load a library that a source has, once."""
    key = (file.path, file.sha256)
    with runtime.lock_of(file.path):
        if key not in _members:
            _members[key] = runtime.prepare_and_load(source, file, facts_of(file), None)
        return _members[key]


def file_signatures(path: str | os.PathLike[str]) -> dict[str, Signature | str]:
    """Return the signature of every function that a .so exports, as the function reports it.

    For a function without a signature (it takes any arguments) the value is the reason, a string.
    Loads the file into this process; needs no GPU.
    """
    loaded = load_file(path)
    found: dict[str, Signature | str] = {}
    for name in loaded.facts.functions:
        try:
            found[name] = probe(runtime.exported(loaded, name))
        except AbiError as error:
            found[name] = str(error)
    return found
