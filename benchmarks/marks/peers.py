"""The peers that are installed, imported in an order that gives one libtvm_ffi."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from fi_ffi.loader import runtime
from marks import Missing

# tvm_ffi first: fi_ffi takes the libtvm_ffi that is in the process already.
_ORDER = {"tvm_ffi": "apache-tvm-ffi", "torch": "torch", "flashinfer": "flashinfer-python"}
# flashinfer-python has two rmsnorms; this takes the one in norm.so.
_SETTING = ("FLASHINFER_USE_CUDA_NORM", "1")


def set_up() -> None:
    """Settings of the peers, for this process and those it starts."""
    os.environ[_SETTING[0]] = _SETTING[1]


class Peers:
    """What could be imported, and why the rest could not."""

    def __init__(self) -> None:
        set_up()
        self._found: dict[str, Any] = {}
        self._lacking: dict[str, str] = {}
        for module, package in _ORDER.items():
            try:
                self._found[module] = importlib.import_module(module)
            except Exception as error:  # flashinfer looks at the GPU as it is imported
                self._lacking[module] = f"{package} ({type(error).__name__}: {error})"

    def has(self, module: str) -> bool:
        return module in self._found

    def need(self, module: str) -> Any:
        """A peer's module, or `Missing`."""
        if module not in self._found:
            raise Missing(self._lacking[module])
        return self._found[module]

    def module(self, name: str) -> Any:
        """A kernel module of those in use, opened by tvm_ffi."""
        return self.need("tvm_ffi").load_module(str(kernels(name)))

    def flashinfer(self, *names: str) -> Any:
        """flashinfer-python, where it has these modules from the same files.

        Without them it would compile its own, for minutes.
        """
        flashinfer = self.need("flashinfer")
        folder = importlib.import_module("flashinfer.jit.env").FLASHINFER_AOT_DIR
        for name in names:
            theirs, mine = Path(folder) / name / f"{name}.so", kernels(name)
            if not theirs.is_file() or not theirs.samefile(mine):
                raise Missing(f"flashinfer-python on the same file ({mine}): install that wheel")
        return flashinfer


def kernels(name: str) -> Path:
    """The file that fi_ffi has a kernel module from."""
    path: Path = runtime.load(name, 0).file.path
    return path
