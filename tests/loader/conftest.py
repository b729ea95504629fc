"""What the loader's tests share."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from fi_ffi.loader import runtime
from fi_ffi.loader.fetch import wheels_lock

from tests.helpers import sampling
from tests.helpers.children import ROOT, done
from tests.helpers.pinned import pinned_wheel, testing_library, tvm_ffi_loaded
from tests.loader.server import File, Server, kernel_members, make_wheel, sha256

__all__ = ["child", "install", "pinned_wheel", "testing_library", "tvm_ffi_loaded"]


@pytest.fixture
def child():
    """Runs code in a process that has loaded nothing; returns what it prints."""

    def run(program, *path, **environment):
        search = os.pathsep.join(map(str, [*path, ROOT]))
        code, out, err = done(program, PYTHONPATH=search, **environment)
        assert code == 0, out + err
        return out.strip()

    return run


@pytest.fixture(scope="session")
def install(tmp_path_factory):
    """Installs a requirement into a folder of its own, once."""

    @functools.cache
    def run(requirement):
        sampling.only_in_full("installs from the package index")
        folder = tmp_path_factory.mktemp("installed")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        options = ["--no-compile", "--disable-pip-version-check", "--target", str(folder)]
        subprocess.run([*pip, *options, requirement], check=True)
        return folder

    return run


@pytest.fixture
def root(tmp_path, monkeypatch):
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
def remote_kernels(root, tmp_path, monkeypatch):
    """A server with the only kernels there are; the lock in use pins them by sha256 alone."""
    wheel, path = make_wheel(kernel_members()), tmp_path / "wheels.lock"
    with Server({"/kernels.whl": File(wheel)}) as server:
        path.write_text(
            LOCK.format(
                url=server.url("/kernels.whl"),
                platform=wheels_lock.this_platform(),
                sha256=sha256(wheel),
            )
        )
        monkeypatch.setenv("FI_FFI_LOCK", str(path))
        monkeypatch.setenv("FI_FFI_SOURCES", "remote")
        monkeypatch.setenv("FI_FFI_CUDA", "cu130")
        wheels_lock.the_lock.cache_clear()
        runtime.use_source(None)
        yield server
    wheels_lock.the_lock.cache_clear()
    runtime.use_source(None)
