"""A cache of its own for every test."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from fi_ffi.loader import cache

CONTENT = bytes(range(256)) * 400


@dataclass(frozen=True)
class Sample:
    """A file for the cache, and the cache."""

    root: Path
    content: bytes = CONTENT
    name: str = "norm.so"

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def path(self):
        return cache.object_path(self.sha256, self.name)

    def store(self, sha256=None, name=None):
        half = len(self.content) // 2
        chunks = [self.content[:half], self.content[half:]]
        return cache.store(chunks, sha256 or self.sha256, name or self.name, "a test")

    def find(self, **how):
        return cache.find(self.sha256, self.name, **how)

    def files(self):
        """All but stamps."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return sorted(path for path in found if path.suffix != ".stamp")

    def temporaries(self):
        return os.listdir(self.root / "tmp") if (self.root / "tmp").exists() else []


@pytest.fixture
def sample(monkeypatch):
    # Not below pytest's folder, which is closed to other users: some tests become one.
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(parent / "cache"))
    monkeypatch.delenv("FI_FFI_PARANOID", raising=False)
    yield Sample(parent / "cache")
    shutil.rmtree(parent)


@pytest.fixture
def small_disk(sample):
    """A file system of 64 KiB where the cache is to be; read-only mounts can be made of it."""
    sample.root.mkdir(mode=0o700)
    options = ["-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(sample.root)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield sample.root
    subprocess.run(["umount", str(sample.root)], check=True)
