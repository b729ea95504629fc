"""The cache: files under the hash of their content.

A file appears under its final name only whole and verified, by a rename; what a
killed process leaves behind lies in `tmp/` and is never looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from fi_ffi.errors import ArtifactError, LoaderError

_CHUNK = 1 << 20


def cache_root() -> Path:
    """`FI_FFI_CACHE_DIR`, or the user's cache directory."""
    chosen = os.environ.get("FI_FFI_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("fi-ffi")


def object_path(sha256: str, name: str) -> Path:
    """Where the file with this content lies, if it is there."""
    return cache_root() / "objects" / sha256[:2] / sha256 / name


def find(sha256: str, name: str) -> Path | None:
    """The cached file, its content hashed again; a damaged one is removed."""
    path = object_path(sha256, name)
    try:
        with path.open("rb") as file:
            if hash_of(file) == sha256:
                return path
    except OSError:
        return None
    shutil.rmtree(path.parent, ignore_errors=True)
    return None


def store(chunks: Iterable[bytes], sha256: str, name: str, origin: str) -> Path:
    """Write `chunks` into the cache; `ArtifactError` unless they hash to `sha256`."""
    final = object_path(sha256, name)
    try:
        tmp_root = cache_root() / "tmp"
        tmp_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tmp_root) as folder:
            found = _write(Path(folder) / "new" / name, chunks)
            if found != sha256:
                raise ArtifactError(f"{origin}: sha256 is {found}, expected {sha256}")
            final.parent.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have been quicker, with the same bytes.
            with contextlib.suppress(FileExistsError):
                _rename_folder(Path(folder) / "new", final.parent)
    except OSError as error:
        raise LoaderError(f"the cache at {cache_root()} cannot be written: {error}") from error
    return final


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    path.parent.mkdir()
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _rename_folder(source: Path, target: Path) -> None:
    if target.exists():
        raise FileExistsError(target)
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise


def hash_of(file: BinaryIO) -> str:
    """The sha256 of an open file's content."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
