"""What the module's fp8 block-scale kernels need of the machine.

They come twice: compiled into the module, and as DeepGEMM's, which the module compiles when it
is called, with nvcc, once it has been told where DeepGEMM's headers are.  Without that the
first are used.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fi_ffi.abi.function import make_array
from fi_ffi.abi.tensor import parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, LoaderError
from fi_ffi.loader import libraries
from fi_ffi.ops import cuda
from fi_ffi.ops.moe.interface import MODULE, SET_INCLUDE_DIRS

_COMPILER = "TRTLLM_DG_NVCC_COMPILER"
_HEADER = "deep_gemm/fp8_gemm_impl.cuh"
# The module gives nvcc's command to a shell, and quotes nothing.
_PLAIN, _WORDS = re.compile(r"[\w./+-]+", re.ASCII), "a path of letters, digits and ./_+- alone"


def compiler() -> str | None:
    """The nvcc that the module would run; None where there is none."""
    chosen = os.environ.get(_COMPILER)
    if chosen is None and os.environ.get("CUDA_HOME"):
        chosen = str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    return shutil.which(chosen or "nvcc")


def set_deepgemm_jit_include_dirs(
    include_dirs: Sequence[str | os.PathLike[str]], device: object = "cuda:0"
) -> None:
    """Have fp8 block-scale calls run DeepGEMM's kernels, compiled when they are first needed.

    Otherwise the module's own are run, which need no compiler.  Each new combination of sizes
    costs seconds of nvcc inside the call; TRTLLM_DG_CACHE_DIR keeps what was compiled.

    Args:
        include_dirs: where `deep_gemm/` is: flashinfer-python's
            `flashinfer/data/csrc/nv_internal/tensorrt_llm`.  None of them (`[]`) goes back to
            the module's own kernels.
        device: whose module.

    Raises `ArgumentError` where the headers are not there, `LoaderError` where nvcc is not.
    """
    op = "set_deepgemm_jit_include_dirs"
    if isinstance(include_dirs, (str, bytes, os.PathLike)) or not isinstance(
        include_dirs, Sequence
    ):
        got = type(include_dirs).__name__
        raise ArgumentTypeError(op, "include_dirs", got=got, expected="a sequence of paths")
    folders = [Path(folder).expanduser().absolute() for folder in include_dirs]
    for folder in folders:
        if not _PLAIN.fullmatch(str(folder)):
            raise ArgumentError(op, "include_dirs", got=folder, expected=_WORDS)
    kept = libraries.deepgemm_folder()
    if folders and not _PLAIN.fullmatch(str(kept)):
        raise LoaderError(f"{op}: {libraries.DEEPGEMM_FOLDER} or HOME: {kept} is not {_WORDS}")
    if folders and not any((folder / _HEADER).is_file() for folder in folders):
        got, expected = ", ".join(map(str, folders)), f"a folder with {_HEADER}"
        raise ArgumentError(op, "include_dirs", got=got, expected=expected)
    if folders and compiler() is None:
        raise LoaderError(
            f"{op}: the module runs nvcc, and there is none: {_COMPILER}, CUDA_HOME or PATH name it"
        )
    place = parse_device(device, op=op)
    if not place.is_cuda:
        raise ArgumentError(op, "device", got=place, expected="a CUDA device")
    from fi_ffi.loader import runtime

    entry = runtime.kernel_entry(MODULE, SET_INCLUDE_DIRS.signature, ">=0.6.3", place.index)
    with cuda.current(place), make_array([str(folder) for folder in folders]) as array:
        entry(array)
