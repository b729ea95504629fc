"""Stands in for torch under FlashInfer's generators; runs in the build environment only.

The generators name dtypes, and ask torch about the C++ compiler. They neither make tensors nor use
a GPU. Modules that are extensions of torch need torch itself: they ask for a name that this module
lacks. This is a plain script like `driver.py`, which loads it if the environment has no torch.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Mapping

from packaging.version import Version

NAME = "torch"
_VERSION = "2.13.0"  # the torch whose names are here
# The dtypes of torch, with their bytes; names in a row are one dtype.
_DTYPES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16 short": 2,
    "int32 int": 4,
    "int64 long": 8,
    "float16 half": 2,
    "bfloat16": 2,
    "float32 float": 4,
    "float64 double": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}


class dtype:
    """A dtype: the generators compare it, take its size, and use it as a key."""

    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize

    def __repr__(self) -> str:
        return f"{NAME}.{self.name}"


class Tensor:
    """A class to name in annotations; there are no tensors."""


class device:
    """A class to name in annotations and defaults."""

    def __init__(self, *_: object) -> None:
        pass


def get_cxx_compiler() -> str:
    """Return the C++ compiler, as torch chooses it."""
    return os.environ.get("CXX") or "c++"


def check_compiler_is_gcc(compiler: str) -> bool:
    """Return whether a compiler is GCC, by what it says of itself."""
    try:
        said = subprocess.run(
            [*compiler.split(), "-v"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            errors="replace",
            check=False,
        ).stdout
    except OSError:
        return False
    return re.search(r"^COLLECT_GCC=", said, re.MULTILINE) is not None and "gcc version" in said


def _module(name: str, **names: object) -> types.ModuleType:
    module = types.ModuleType(name, __doc__)
    module.__path__ = []  # a package: what is not here is missing, as a module too
    vars(module).update(names)
    sys.modules[name] = module
    return module


def install() -> None:
    """Put the stand-in into this process, if it has no torch."""
    try:
        importlib.import_module(NAME)
    except ModuleNotFoundError:
        pass
    else:
        return
    # TVM-FFI looks for torch when it is imported, and would take this for it.
    importlib.import_module("tvm_ffi")
    members: dict[str, object] = {"dtype": dtype, "Tensor": Tensor, "device": device}
    for names, itemsize in _DTYPES.items():
        made = dtype(names.partition(" ")[0], itemsize)
        members |= dict.fromkeys(names.split(), made)
    # As in every torch since 2.7.
    members["_C"] = _module(f"{NAME}._C", _GLIBCXX_USE_CXX11_ABI=True)
    # Without a CUDA of its own, so that the release of nvcc counts.
    members["version"] = _module(f"{NAME}.version", cuda=None, hip=None)
    no_gpus = {"is_available": lambda: False, "device_count": lambda: 0}
    members["cuda"] = _module(f"{NAME}.cuda", **no_gpus)
    extension = _module(
        f"{NAME}.utils.cpp_extension",
        check_compiler_is_gcc=check_compiler_is_gcc,
        get_cxx_compiler=get_cxx_compiler,
    )
    members["torch_version"] = _module(
        f"{NAME}.torch_version", TorchVersion=Version, __version__=_VERSION
    )
    members["utils"] = _module(f"{NAME}.utils", cpp_extension=extension)
    _module(NAME, **members)
