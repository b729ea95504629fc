"""Libraries that kernel modules need besides libtvm_ffi: CUDA's.

A module names them by file (`libcudart.so.13`, `libcublas.so.12`), and the dynamic linker takes the
library that this process has under that name. So they are loaded first and globally, from wherever
they are installed. This module also prepares a folder that some modules create while they are
loaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import trust

# The package that provides a library; those for CUDA 12 have a suffix in their names.
PACKAGES = {
    "cudart": "nvidia-cuda-runtime",
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "nvrtc": "nvidia-cuda-nvrtc",
}
# The extra of fi_ffi that provides a library, by CUDA version.
_EXTRAS = {
    12: {"cudart": "cu12", "cublas": "gemm-cu12", "cublasLt": "gemm-cu12", "nvrtc": "gemm-cu12"},
    13: {"cudart": "cu13", "cublas": "gemm", "cublasLt": "gemm", "nvrtc": "gemm"},
}
# Dependencies that the linker may not find itself.
_FIRST = {"cublas": "cublasLt"}

_NAME = re.compile(r"lib(\w+)\.so\.(\d+)")


# An export of modules that can compile DeepGEMM's kernels.
DEEPGEMM_EXPORT = "set_deepgemm_jit_include_dirs"
DEEPGEMM_FOLDER = "TRTLLM_DG_CACHE_DIR"


def prepare(functions: Container[str], needed: Iterable[str]) -> None:
    """Load the libraries of a module with these functions and dependencies.

    Raises `LoaderError` if something is missing.
    """
    if DEEPGEMM_EXPORT in functions:
        check_deepgemm_folder()
    for file in needed:
        match = _NAME.fullmatch(file)
        if match and match[1] in PACKAGES and match[1] != "cudart":
            load(file)


def package(name: str, major: int) -> str:
    """Return the name of the distribution that provides a library for a CUDA version."""
    return f"{PACKAGES[name]}-cu12" if major == 12 else PACKAGES[name]


@functools.cache
def load(file: str) -> tuple[Any, str]:
    """Load a library of CUDA; return it and where it was found.

    A copy in this process comes first, then installed packages, the system, conda and CUDA_HOME. If
    none has it, raises `LoaderError` with the package to install.
    """
    match = _NAME.fullmatch(file)
    assert match is not None, file
    loaded = in_process(file)
    if loaded is not None:
        return loaded, "already in this process"
    if match[1] in _FIRST:
        with contextlib.suppress(LoaderError):  # the linker may still find it
            load(file.replace(match[1], _FIRST[match[1]]))
    reasons = []
    for path in _places(file):
        try:
            found = ffi.dlopen(path, os.RTLD_NOW | os.RTLD_GLOBAL)
        except OSError as error:
            reasons.append(str(error).partition("\n")[0])
            continue
        return found, path
    raise _absent(file, match[1], int(match[2]), reasons[0])


def _places(file: str) -> Iterator[str]:
    """Yield the possible locations of a library: paths, and its name for the dynamic linker."""
    for folder in dict.fromkeys(sys.path):
        # Packages of CUDA 13 share a folder; each of CUDA 12 has its own.
        yield from map(str, sorted(Path(folder or ".").glob(f"nvidia/*/lib/{file}")))
    yield file
    roots = [
        os.environ.get("CONDA_PREFIX"),
        os.environ.get("CUDA_PATH"),
        os.environ.get("CUDA_HOME"),
    ]
    for root in filter(None, (*roots, "/usr/local/cuda")):
        for lib in ("lib64", "lib", "targets/*/lib"):
            yield from map(str, sorted(Path(root).glob(f"{lib}/{file}")))


def in_process(file: str) -> Any:
    """Return a library that is already loaded under this name, with its symbols made global."""
    # cffi's dlopen would expect dlerror to report a reason, and there is none.
    if library.in_process(file) is None:
        return None
    return ffi.dlopen(file, os.RTLD_NOW | os.RTLD_GLOBAL)


def requirement(name: str, major: int) -> str:
    """Return the pip requirement for a library of this CUDA major version."""
    return f"{package(name, major)}>={major},<{major + 1}"


def _absent(file: str, name: str, major: int, reason: str) -> LoaderError:
    wanted = requirement(name, major)
    extra = _EXTRAS.get(major, {}).get(name)
    also = f" (or fi-ffi[{extra}])" if extra else ""
    return LoaderError(
        f"{file} was not found: `pip install '{wanted}'`{also}, or set CUDA_HOME to a CUDA "
        f"{major} toolkit ({reason})"
    )


def deepgemm_folder() -> Path:
    """Return the folder in which a module with DeepGEMM's compiler keeps its results."""
    if DEEPGEMM_FOLDER in os.environ:
        return Path(os.environ[DEEPGEMM_FOLDER])
    if "HOME" in os.environ:
        return Path(os.environ["HOME"], ".tensorrt_llm")
    import tempfile  # imported late: most modules have no such compiler

    return Path(tempfile.gettempdir(), "tensorrt_llm")


def check_deepgemm_folder() -> None:
    """Raise `LoaderError` if a module with DeepGEMM's compiler could not create its folders.

    The module creates them while it is loaded, even if it never compiles. If that fails it throws
    an exception that nothing catches, and the process ends.
    """
    folder = deepgemm_folder()
    try:
        if os.environ.get(DEEPGEMM_FOLDER) == "":
            raise FileNotFoundError(f"{DEEPGEMM_FOLDER} is empty")
        for name in ("tmp", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            trust.check_owner(folder / name)
            trust.check_user_path(folder / name)
    except (OSError, ArtifactError) as error:
        raise LoaderError(
            f"the module makes {folder} when it is loaded, which fails here ({error}); "
            f"{DEEPGEMM_FOLDER} may name another folder"
        ) from error
