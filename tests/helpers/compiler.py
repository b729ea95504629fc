"""Whether this machine can compile kernels."""

from __future__ import annotations

from fi_ffi.errors import BuildError
from fi_ffi.loader.building.environment import find_cxx, find_toolkits
from fi_ffi.loader.machine import CUDA_MAJOR


def why_not_build() -> str | None:
    """Why kernels cannot be compiled on this machine, or None if they can be."""
    if not any(toolkit.major == CUDA_MAJOR for toolkit in find_toolkits()):
        return f"no nvcc of CUDA {CUDA_MAJOR} on this machine"
    try:
        find_cxx()
    except BuildError as error:
        return str(error)
    return None
