"""What this machine is, asked of the CUDA runtime: driver version and devices.

No context is made, and nothing is imported: the kernels need this library anyway.
"""

from __future__ import annotations

import functools
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import LoaderError

CUDA_MAJOR = 13  # of the runtime that fi_ffi loads, and so of the kernels it can serve
CUDART = f"libcudart.so.{CUDA_MAJOR}"

# cudaDeviceAttr of driver_types.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@functools.cache
def load_cudart() -> tuple[Any, str]:
    """The CUDA runtime as a cffi library, and where it was found.

    cuda-pathfinder looks at installed packages, conda, CUDA_HOME and the system.
    """
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib("cudart").abs_path or CUDART
        return ffi.dlopen(path), path
    except (DynamicLibNotFoundError, OSError) as error:
        raise LoaderError(
            f"{CUDART} was not found: `pip install 'nvidia-cuda-runtime>=13,<14'`, "
            f"or set CUDA_HOME to a CUDA {CUDA_MAJOR} toolkit ({error})"
        ) from error


def _ask(function: str, *arguments: int) -> int | None:
    value = ffi.new("int *")
    return value[0] if getattr(load_cudart()[0], function)(value, *arguments) == 0 else None


def driver_version() -> tuple[int, int] | None:
    """The CUDA version the driver supports, or None where there is no driver."""
    number = _ask("cudaDriverGetVersion")
    return (number // 1000, number % 1000 // 10) if number else None


def device_count() -> int:
    """GPUs that this process sees."""
    return _ask("cudaGetDeviceCount") or 0


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """A device's compute capability; `LoaderError` where there is no such device."""
    major = _ask("cudaDeviceGetAttribute", _CAPABILITY_MAJOR, device)
    minor = _ask("cudaDeviceGetAttribute", _CAPABILITY_MINOR, device)
    if major is None or minor is None:
        raise LoaderError(f"there is no cuda:{device}: this process sees {device_count()} GPUs")
    return major, minor
