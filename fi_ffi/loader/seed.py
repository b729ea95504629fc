"""A second, read-only cache, such as one in a container image: `FI_FFI_SEED_CACHE`.

It has the cache's layout and is searched after the cache and before the network. Nothing is written
into it, and its stamps are not trusted: each file is hashed. A file that only this user and root
can change is loaded in place. Another file is copied into the cache and hashed while it is copied,
so that its owner does not matter.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fi_ffi.abi import library
from fi_ffi.errors import ArtifactError, LoaderError, let_through
from fi_ffi.loader import cache, trust

ENVIRONMENT = "FI_FFI_SEED_CACHE"

_CHUNK = 1 << 20
# Files that this process has hashed, with their state at that time.
_hashed: dict[Path, tuple[cache.State, str]] = {}
library.renew_after_fork(globals(), "_hashed", dict)


def seed_root() -> Path | None:
    """Return the directory that FI_FFI_SEED_CACHE names; `LoaderError` if it does not exist."""
    chosen = os.environ.get(ENVIRONMENT)
    if not chosen:
        return None
    root = cache.expanded(chosen, ENVIRONMENT).absolute()
    if not root.is_dir():
        raise LoaderError(
            f"{ENVIRONMENT} names {root}, which is no directory: name a cache that was filled, "
            "or unset it"
        )
    return root


def find(sha256: str, name: str) -> tuple[Path, cache.State | None] | None:
    """Return the file with this content, of the cache or else of the seed, or None.

    With it comes its state when it was hashed; None if it is in the cache.
    """
    cached = cache.find(sha256, name)
    if cached is not None:
        return cached, None
    root = seed_root()
    if root is None:
        return None
    path = root / cache.object_path(sha256, name).relative_to(cache.cache_root())
    with contextlib.suppress(OSError), open(trust.open_regular(path, follow=False), "rb") as file:
        before = cache.state_of(os.fstat(file.fileno()))
        if cache.is_paranoid() or _hashed.get(path) != (before, sha256):
            if cache.hash_of(file) != sha256:
                return None
            _hashed[path] = before, sha256
        if _is_safe(root, path):
            return path, before
        file.seek(0)
        chunks = iter(lambda: file.read(_CHUNK), b"")
        return cache.store(chunks, sha256, name, str(path), size=before[0]), None
    return None


def _is_safe(root: Path, path: Path) -> bool:
    """Return whether only this user and root can change a file and its path."""
    try:
        if not trust.folders_exist(root, path.parent):
            return False
        trust.check_object(path, os.lstat(path))
    except (ArtifactError, OSError) as error:
        let_through(error)
        return False
    return True
