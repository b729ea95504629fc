"""What must be there before a kernel module is loaded, beside libtvm_ffi: CUDA's libraries.

A module names them by file (`libcudart.so.13`, `libcublas.so.12`), and the dynamic linker takes
what this process has under that name.  They are brought here first, from wherever they are
installed, and loaded globally.  And a folder that some modules make while they are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import trust
from fi_ffi.loader.fatbin import CudaCode, runs_on

# The package of the index that has a library; those of CUDA 12 have its number in their names.
PACKAGES = {
    "cudart": "nvidia-cuda-runtime",
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "nvrtc": "nvidia-cuda-nvrtc",
}
# The extra of fi_ffi that brings a library, by the CUDA.
_EXTRAS = {
    12: {"cudart": "cu12", "cublas": "gemm-cu12", "cublasLt": "gemm-cu12", "nvrtc": "gemm-cu12"},
    13: {"cudart": "cu13", "cublas": "gemm", "cublasLt": "gemm", "nvrtc": "gemm"},
}
# What a library needs and may lie where only it is looked for.
_FIRST = {"cublas": "cublasLt"}

_NAME = re.compile(r"lib(\w+)\.so\.(\d+)")


# A function of modules that compile DeepGEMM's kernels, if they are told to.
_COMPILES = "set_deepgemm_jit_include_dirs"
DEEPGEMM_FOLDER = "TRTLLM_DG_CACHE_DIR"
# A function of modules that copy a number from the current GPU as they are loaded, and throw where
# that fails (`configureKernel` of csrc/xqa/mla_sm120.cu); nothing catches it.
_ASKS_GPU = "xqa_wrapper_mla"


def prepare(
    functions: Container[str], needed: Iterable[str], codes: Sequence[CudaCode] = ()
) -> None:
    """Bring what a module needs that exports these functions, needs these libraries and has this
    device code.

    Raises `LoaderError` where something is missing.
    """
    if _COMPILES in functions:
        check_deepgemm_folder()
    if _ASKS_GPU in functions:
        check_gpu(codes)
    for file in needed:
        match = _NAME.fullmatch(file)
        if match and match[1] in PACKAGES and match[1] != "cudart":
            load(file)


def package(name: str, major: int) -> str:
    """The distribution that has a library of a CUDA, in the index's own name."""
    return f"{PACKAGES[name]}-cu12" if major == 12 else PACKAGES[name]


@functools.cache
def load(file: str) -> tuple[Any, str]:
    """A library as a cffi library, and where it was found: a copy that this process has, or
    else that of installed packages, the system, conda or CUDA_HOME.

    Raises `LoaderError`, with the package that has it, where it is nowhere.
    """
    match = _NAME.fullmatch(file)
    assert match is not None, file
    loaded = in_process(file)
    if loaded is not None:
        return loaded, "already in this process"
    if match[1] in _FIRST:
        with contextlib.suppress(LoaderError):  # or the linker finds it
            load(file.replace(match[1], _FIRST[match[1]]))
    said = []
    for path in _places(file):
        try:
            found = ffi.dlopen(path, os.RTLD_NOW | os.RTLD_GLOBAL)
        except OSError as error:
            said.append(str(error).partition("\n")[0])
            continue
        return found, path
    raise _absent(file, match[1], int(match[2]), said[0])


def _places(file: str) -> Iterator[str]:
    """Where a library may be: a path, or its name, by which the dynamic linker finds it."""
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
    """A library that is loaded under this name, whose symbols then serve what is loaded next."""
    # cffi's own dlopen expects a reason for a failure, and here there is none.
    if library.in_process(file) is None:
        return None
    return ffi.dlopen(file, os.RTLD_NOW | os.RTLD_GLOBAL)


def requirement(name: str, major: int) -> str:
    """What pip is asked for, for a library of this major version of CUDA."""
    return f"{package(name, major)}>={major},<{major + 1}"


def _absent(file: str, name: str, major: int, reason: str) -> LoaderError:
    wanted = requirement(name, major)
    extra = _EXTRAS.get(major, {}).get(name)
    also = f" (or fi-ffi[{extra}])" if extra else ""
    return LoaderError(
        f"{file} was not found: `pip install '{wanted}'`{also}, or set CUDA_HOME to a CUDA "
        f"{major} toolkit ({reason})"
    )


def check_gpu(codes: Sequence[CudaCode]) -> None:
    """Raise `LoaderError` where a module that calls its GPU as it is loaded could not.

    The process would end.
    """
    from fi_ffi.loader import machine  # which loads its runtime by this module

    why = "this process sees none"
    if machine.device_count():
        device = machine.current_device()
        verdict = runs_on(codes, machine.capability(device))
        if verdict.ok:
            return
        why = f"cuda:{device}, which is current, is another: it {verdict.reason}"
    raise LoaderError(
        f"the module asks its GPU when it is loaded, and would end the process: {why}. "
        "`fi-ffi inspect --no-load` reads the file alone"
    )


def deepgemm_folder() -> Path:
    """Where such a module makes folders as it is loaded, and keeps what it compiles."""
    if DEEPGEMM_FOLDER in os.environ:
        return Path(os.environ[DEEPGEMM_FOLDER])
    if "HOME" in os.environ:
        return Path(os.environ["HOME"], ".tensorrt_llm")
    return Path(tempfile.gettempdir(), "tensorrt_llm")


def check_deepgemm_folder() -> None:
    """Raise `LoaderError` where a module with DeepGEMM's compiler could not make its folders.

    It makes them while it is loaded, compiler or not, and where that fails it throws what
    nothing catches: the process would end.
    """
    folder = deepgemm_folder()
    try:
        if os.environ.get(DEEPGEMM_FOLDER) == "":
            raise FileNotFoundError(f"{DEEPGEMM_FOLDER} is empty")
        for name in ("tmp", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            trust.check_owner(folder / name)
            trust.check_named(folder / name)
    except (OSError, ArtifactError) as error:
        raise LoaderError(
            f"the module makes {folder} when it is loaded, which fails here ({error}); "
            f"{DEEPGEMM_FOLDER} may name another folder"
        ) from error
