"""Fixtures over the pinned apache-tvm-ffi wheel, fetched as the loader fetches it."""

from __future__ import annotations

import functools
import tempfile
import zipfile
from pathlib import Path

import pytest

from fi_ffi.abi import library
from fi_ffi.loader import fetch, lock, runtime

TESTING_MEMBER = "tvm_ffi/lib/libtvm_ffi_testing.so"

_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-tests-")


@functools.cache
def download_pinned_wheel() -> Path:
    """The whole wheel, once for all test folders that import this."""
    wheel = fetch._download(lock.tvm_ffi_pin().file_for_this_machine(), Path(_folder.name))
    assert wheel.suffix == ".whl", "the tests need pip: uv fetches no whole wheels"
    return wheel


@pytest.fixture(scope="session")
def pinned_wheel() -> Path:
    return download_pinned_wheel()


@pytest.fixture(scope="session")
def tvm_ffi_loaded() -> str:
    """libtvm_ffi loaded into this process; its path."""
    return runtime.ensure_tvm_ffi().path


@pytest.fixture(scope="session")
def testing_library(pinned_wheel: Path, tvm_ffi_loaded: str) -> Path:
    """libtvm_ffi_testing.so, loaded: its functions are then in the global table."""
    path = Path(_folder.name) / TESTING_MEMBER
    # Once for all folders: a file that is loaded must not be written again.
    if not path.exists():
        with zipfile.ZipFile(pinned_wheel) as archive:
            archive.extract(TESTING_MEMBER, _folder.name)
    library.open_module(str(path))
    return path
