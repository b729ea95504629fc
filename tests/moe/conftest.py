"""Modules with the kernels' interface, compiled against the pinned TVM-FFI's headers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_ffi.abi.function import Entry
from fi_ffi.loader import runtime
from fi_ffi.modules import files

from tests.helpers import compiler


class Recording:
    """A compiled module: its entries, and what its methods wrote down last."""

    def __init__(self, *options: str) -> None:
        self.path = compiler.compiled(Path(__file__).with_name("recording.cc"), *options)
        self._loaded = files.load_file(self.path)

    def entry(self, name: str) -> Entry:
        return runtime.exported(self._loaded, name)

    def last(self) -> str:
        return str(self.entry("last")())

    def alive(self) -> int:
        return int(self.entry("count_alive")())


@pytest.fixture(scope="session")
def recording() -> Callable[..., Recording]:
    return functools.cache(Recording)
