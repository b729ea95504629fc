"""Fixtures over the installed apache-tvm-ffi."""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
import zipfile
from pathlib import Path

import pytest

from fi_ffi.abi import library
from fi_ffi.loader import runtime, tvm_ffi

TESTING_MEMBER = "tvm_ffi/lib/libtvm_ffi_testing.so"

_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-tests-")


@functools.cache
def download_pinned_wheel() -> Path:
    """The installed distribution as a wheel, once for all test folders that import this."""
    distribution = importlib.metadata.distribution(tvm_ffi.PROJECT)
    wheel = Path(_folder.name) / f"apache_tvm_ffi-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and path.suffix != ".pyc" and path.is_file():
                archive.write(path, str(file))
    return wheel


@pytest.fixture(scope="session")
def pinned_wheel() -> Path:
    return download_pinned_wheel()


@pytest.fixture(scope="session")
def tvm_ffi_loaded() -> str:
    """libtvm_ffi loaded into this process; its path."""
    return runtime.ensure_tvm_ffi().path


@pytest.fixture(scope="session")
def testing_library(tvm_ffi_loaded: str) -> Path:
    """libtvm_ffi_testing.so, loaded: its functions are then in the global table."""
    distribution = importlib.metadata.distribution(tvm_ffi.PROJECT)
    path = Path(str(distribution.locate_file(TESTING_MEMBER)))
    library.open_module(str(path))
    return path
