"""What must be there before a kernel module is loaded, beside libtvm_ffi and CUDA's runtime.

CUDA's other libraries: a module names them by file (`libcublas.so.13`), and the dynamic linker
takes what this process has under that name.  They are brought here first, from wherever they
are installed, and loaded globally.  And a folder that some modules make while they are loaded.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import machine, trust
from fi_ffi.loader.fatbin import CudaCode, runs_on
from fi_ffi.loader.machine import CUDA_MAJOR

# As cuda-pathfinder calls them -> the package of the index that has them.
PACKAGES = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "nvrtc": "nvidia-cuda-nvrtc",
}
CUBLAS_LT = f"libcublasLt.so.{CUDA_MAJOR}"

_NAME = re.compile(r"lib(\w+)\.so\.\d+")


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
        if match and match[1] in PACKAGES:
            load(file)


@functools.cache
def load(file: str) -> tuple[Any, str]:
    """A library as a cffi library, and where it was found: a copy that this process has, or
    else what cuda-pathfinder finds in installed packages, conda, CUDA_HOME and the system.

    Raises `LoaderError`, with the package that has it, where it is nowhere.
    """
    match = _NAME.fullmatch(file)
    assert match is not None, file
    loaded = in_process(file)
    if loaded is not None:
        return loaded, "already in this process"
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib(match[1]).abs_path or file
    except (RuntimeError, OSError) as error:
        raise _absent(file, match[1], str(error).partition("\n")[0]) from error
    loaded = in_process(file)
    if loaded is None:
        raise _absent(file, match[1], f"found {path}, which is another")
    return loaded, path


def in_process(file: str) -> Any:
    """A library that is loaded under this name, whose symbols then serve what is loaded next."""
    # cffi's own dlopen expects a reason for a failure, and here there is none.
    if library.in_process(file) is None:
        return None
    return ffi.dlopen(file, os.RTLD_NOW | os.RTLD_GLOBAL)


def _absent(file: str, name: str, reason: str) -> LoaderError:
    return LoaderError(
        f"{file} was not found: `pip install '{PACKAGES[name]}>={CUDA_MAJOR},<{CUDA_MAJOR + 1}'` "
        f"(or fi-ffi[gemm]), or set CUDA_HOME to a CUDA {CUDA_MAJOR} toolkit ({reason})"
    )


def check_gpu(codes: Sequence[CudaCode]) -> None:
    """Raise `LoaderError` where a module that calls its GPU as it is loaded could not.

    The process would end.
    """
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
