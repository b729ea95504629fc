"""Modules with the kernels' interface, compiled against the pinned TVM-FFI's headers."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_ffi.abi.function import Entry
from fi_ffi.errors import BuildError
from fi_ffi.loader import runtime
from fi_ffi.loader.building.environment import find_cxx

from tests.helpers.pinned import download_pinned_wheel

_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-moe-")


@functools.cache
def _compiled(*options: str) -> Path:
    try:
        compiler = find_cxx().split()
    except BuildError as error:
        pytest.skip(str(error))
    folder = Path(_folder.name)
    headers = folder / "tvm_ffi" / "include"
    if not headers.exists():
        with zipfile.ZipFile(download_pinned_wheel()) as archive:
            members = [name for name in archive.namelist() if name.startswith("tvm_ffi/include/")]
            archive.extractall(folder, members)
    path = folder / f"recording{''.join(options)}.so"
    source = Path(__file__).parent / "recording.cc"
    command = [*compiler, "-std=c++17", "-O0", "-shared", "-fPIC", *options, f"-I{headers}"]
    subprocess.run([*command, str(source), "-o", str(path)], check=True, timeout=300)
    return path


class Recording:
    """A compiled module: its entries, and what its methods wrote down last."""

    def __init__(self, *options: str) -> None:
        self.path = _compiled(*options)
        self._loaded = runtime.load_file(self.path)

    def entry(self, name: str) -> Entry:
        return runtime.exported(self._loaded, name)

    def last(self) -> str:
        return str(self.entry("last")())

    def alive(self) -> int:
        return int(self.entry("count_alive")())


@pytest.fixture(scope="session")
def recording() -> Callable[..., Recording]:
    return functools.cache(Recording)
