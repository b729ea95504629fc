"""Libraries compiled by the tests against the pinned TVM-FFI's headers."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.errors import BuildError
from fi_ffi.loader.building.environment import find_cxx
from fi_ffi.ops.modules import Module

from tests.helpers.pinned import (
    download_pinned_wheel,
    pinned_wheel,
    testing_library,
    tvm_ffi_loaded,
)

__all__ = ["pinned_wheel", "testing_library", "tvm_ffi_loaded"]

HERE = Path(__file__).parent
_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-modules-")


@functools.cache
def headers() -> Path:
    with zipfile.ZipFile(download_pinned_wheel()) as archive:
        members = [name for name in archive.namelist() if name.startswith("tvm_ffi/include/")]
        archive.extractall(_folder.name, members)
    return Path(_folder.name) / "tvm_ffi" / "include"


@functools.cache
def compiled(source: str, *options: str) -> Path:
    """A library of a source beside this file."""
    try:
        compiler = find_cxx().split()
    except BuildError as error:
        pytest.skip(str(error))
    path = Path(_folder.name) / f"{Path(source).stem}{''.join(options)}.so"
    language = ["-xc++", "-std=c++17"] if source.endswith(".cc") else ["-xc"]
    command = [*compiler, *language, "-O0", "-shared", "-fPIC", *options, f"-I{headers()}"]
    subprocess.run([*command, str(HERE / source), "-o", str(path)], check=True, timeout=300)
    return path


@pytest.fixture(scope="session")
def compile_library() -> Callable[..., Path]:
    return compiled


@pytest.fixture(scope="session")
def every() -> Module:
    """every_kind.cc: a function for every kind of parameter and result."""
    return fi_ffi.module(compiled("every_kind.cc"))


@pytest.fixture
def by_hand() -> Module:
    """by_hand.c: functions that tell no signature, and would crash if they were asked."""
    return fi_ffi.module(compiled("by_hand.c"))
