"""DeepGEMM's headers and compiler for the fp8 block-scale kernels.

The module has such kernels compiled in. It can also compile DeepGEMM's when it is called, with
nvcc, once it knows the path of DeepGEMM's headers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fi_ffi.abi.function import make_array
from fi_ffi.abi.tensor import parse_device
from fi_ffi.errors import LoaderError
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.moe.interface import MODULE, SET_INCLUDE_DIRS

_COMPILER = "TRTLLM_DG_NVCC_COMPILER"
_HEADER = "deep_gemm/fp8_gemm_impl.cuh"
# The module passes nvcc's command to a shell without quoting.
_PLAIN, _WORDS = re.compile(r"[\w./+-]+", re.ASCII), "a path of letters, digits and ./_+- alone"


def compiler() -> str | None:
    """Return the nvcc that the module would run, or None."""
    chosen = os.environ.get(_COMPILER)
    if chosen is None and os.environ.get("CUDA_HOME"):
        chosen = str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    return shutil.which(chosen or "nvcc")


def set_deepgemm_jit_include_dirs(
    include_dirs: Sequence[str | os.PathLike[str]], device: object = "cuda:0"
) -> None:
    """Run DeepGEMM's kernels for fp8 block-scale calls, and compile them at first use.

    By default the module's own kernels run, which need no compiler. Each new combination of sizes
    costs seconds of nvcc inside the call; the directory TRTLLM_DG_CACHE_DIR caches the results.

    Args:
        include_dirs: paths of directories that contain `deep_gemm/`: in flashinfer-python
            `flashinfer/data/csrc/nv_internal/tensorrt_llm`. An empty list restores the module's own
            kernels.
        device: the device whose module is set up.

    Raises `ArgumentError` if the headers are missing, and `LoaderError` if nvcc is.
    """
    op = "set_deepgemm_jit_include_dirs"
    refuse = Refusal(op)
    if isinstance(include_dirs, (str, bytes)) or not isinstance(include_dirs, Sequence):
        raise refuse.type("include_dirs", include_dirs, "a sequence of paths")
    folders = [Path(folder).expanduser().absolute() for folder in include_dirs]
    for folder in folders:
        if not _PLAIN.fullmatch(str(folder)):
            raise refuse("include_dirs", folder, _WORDS)
    from fi_ffi.loader import runtime  # imported late: it takes as long as all the rest

    kept = runtime.deepgemm_folder()
    if folders and not _PLAIN.fullmatch(str(kept)):
        raise LoaderError(f"{op}: {runtime.DEEPGEMM_FOLDER} or HOME: {kept} is not {_WORDS}")
    if folders and not any((folder / _HEADER).is_file() for folder in folders):
        got = ", ".join(map(str, folders))
        raise refuse("include_dirs", got, f"a folder with {_HEADER}")
    if folders and compiler() is None:
        raise LoaderError(
            f"{op}: the module runs nvcc, and there is none: {_COMPILER}, CUDA_HOME or PATH name it"
        )
    place = parse_device(device, op=op)
    if not place.is_cuda:
        raise refuse("device", place, "a CUDA device")
    from fi_ffi.loader import runtime

    entry = runtime.kernel_entry(MODULE, SET_INCLUDE_DIRS.signature, ">=0.6.3", place.index)
    with cuda.current(place), make_array([str(folder) for folder in folders]) as array:
        entry(array)
