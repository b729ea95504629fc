"""What the loader's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import fi_ffi

from pinned import pinned_wheel, testing_library, tvm_ffi_loaded

__all__ = ["child", "install", "pinned_wheel", "testing_library", "tvm_ffi_loaded"]

SOURCE = Path(fi_ffi.__file__).parents[1]


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., str]:
    """Runs code in a process that has loaded nothing; returns what it prints."""

    def run(code: str, *path: Path, **environment: str) -> str:
        search = os.pathsep.join(map(str, [*path, SOURCE]))
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": search, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Installs a requirement into a folder of its own, once."""
    done: dict[str, Path] = {}

    def run(requirement: str) -> Path:
        if requirement not in done:
            folder = tmp_path_factory.mktemp("installed")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), requirement], check=True)
            done[requirement] = folder
        return done[requirement]

    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and the network allowed."""
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FI_FFI_OFFLINE", raising=False)
    return tmp_path / "cache"
