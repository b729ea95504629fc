"""What the loader's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.loader import lock, runtime

from tests.helpers.pinned import pinned_wheel, testing_library, tvm_ffi_loaded
from tests.loader.server import File, Server, kernel_members, make_wheel, sha256

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


LOCK = """
schema = 1
[kernels]
default = "1.2.3"
url = "{url}"
[[kernels.files]]
release = "1.2.3"
cuda = "cu130"
platform = "{platform}"
layout = "monolithic"
file = "flashinfer_jit_cache-1.2.3+cu130-cp39-abi3-linux_x86_64.whl"
sha256 = "{sha256}"
provenance = "a test"
"""


@pytest.fixture
def remote_kernels(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with the only kernels there are; the lock in use pins them by sha256 alone."""
    wheel, path = make_wheel(kernel_members()), tmp_path / "wheels.lock"
    with Server({"/kernels.whl": File(wheel)}) as server:
        path.write_text(
            LOCK.format(
                url=server.url("/kernels.whl"),
                platform=lock.this_platform(),
                sha256=sha256(wheel),
            )
        )
        monkeypatch.setenv("FI_FFI_LOCK", str(path))
        monkeypatch.setenv("FI_FFI_SOURCES", "remote")
        monkeypatch.setenv("FI_FFI_CUDA", "cu130")
        lock.the_lock.cache_clear()
        runtime.use_source(None)
        yield server
    lock.the_lock.cache_clear()
    runtime.use_source(None)
