"""What this machine is, asked of the CUDA runtime: driver version and devices.

No context is made, and nothing is imported: the kernels need this library anyway.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import LoaderError

CUDA_MAJOR = 13  # of the runtime that fi_ffi loads, and so of the kernels it can serve
CUDART = f"libcudart.so.{CUDA_MAJOR}"

# cudaDeviceAttr of driver_types.h
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76


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


_device_count = 0


def device_count() -> int:
    """GPUs that this process sees; asked once there is one."""
    global _device_count
    if not _device_count:
        _device_count = _ask("cudaGetDeviceCount") or 0
    return _device_count


class _Thread(threading.local):
    def __init__(self) -> None:
        self.bound: set[int] = set()


thread = _Thread()  # `bound`: the devices whose context this thread has been given


def make_current(device: int) -> int | None:
    """Make a device this thread's current one; the one it replaces, or None where it was.

    A device that this thread has not used yet is set even where it is current: only that
    gives the thread its context.  Kernels that encode TMA descriptors need one before they
    launch: without, the encoding fails, and the kernel is launched with what is left.
    """
    bound = thread.bound
    if device in bound and device == 0 and device_count() == 1:  # there is no other
        return None
    runtime, current = load_cudart()[0], ffi.new("int *")
    code = runtime.cudaGetDevice(current)
    if code == 0 and current[0] == device and device in bound:
        return None
    code = code or runtime.cudaSetDevice(device)
    if code:
        raise LoaderError(f"cuda:{device} cannot be used: CUDA error {code}")
    bound.add(device)
    return None if current[0] == device else int(current[0])


def multiprocessors(device: int) -> int:
    """How many streaming multiprocessors a device has."""
    return _attribute(device, _MULTIPROCESSORS)


@functools.cache
def _attribute(device: int, attribute: int) -> int:
    value = _ask("cudaDeviceGetAttribute", attribute, device)
    if value is None:
        raise LoaderError(f"there is no cuda:{device}: this process sees {device_count()} GPUs")
    return value


def capability(device: int) -> tuple[int, int]:
    """A device's compute capability; `LoaderError` where there is no such device."""
    return _attribute(device, _CAPABILITY_MAJOR), _attribute(device, _CAPABILITY_MINOR)
