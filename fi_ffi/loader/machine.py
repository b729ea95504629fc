"""What this machine is, asked of the CUDA runtime: driver version and devices.

No context is made, and nothing is imported: the kernels need this library anyway.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from fi_ffi.abi import failure, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import KernelError, LoaderError
from fi_ffi.loader import cuda_errors

CUDA_MAJOR = 13  # of the runtime that fi_ffi loads, and so of the kernels it can serve
CPUS = ("x86_64", "aarch64")  # that there are kernels for
CUDART = f"libcudart.so.{CUDA_MAJOR}"

# cudaDeviceAttr of driver_types.h
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_SHARED_MEMORY = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin

_NOT_INITIALIZED = 3  # cudaErrorInitializationError: what a forked child is told
_START_OTHERWISE = (
    "fork before the first use of a GPU, or start processes with multiprocessing's "
    "`spawn` or `forkserver`"
)
# Whether this process was forked off another that had used a GPU by then.
_is_cut_off = False


@functools.cache
def load_cudart() -> tuple[Any, str]:
    """The CUDA runtime as a cffi library, and where it was found.

    cuda-pathfinder looks at installed packages, conda, CUDA_HOME and the system.
    """
    refuse_after_fork()
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib("cudart").abs_path or CUDART
        runtime = ffi.dlopen(path)
        failure.examine = examined
        return runtime, path
    except (DynamicLibNotFoundError, OSError) as error:
        raise LoaderError(
            f"{CUDART} was not found: `pip install 'nvidia-cuda-runtime>=13,<14'`, "
            f"or set CUDA_HOME to a CUDA {CUDA_MAJOR} toolkit ({error})"
        ) from error


def is_cut_off() -> bool:
    """Whether this process can use no GPU, because its parent had when it was forked.

    What the parent had of CUDA is to be left alone: not even freed.
    """
    return _is_cut_off


def refuse_after_fork() -> None:
    """Raise `LoaderError` where this process can use no GPU because of a fork."""
    if _is_cut_off:
        raise LoaderError(
            "no GPU can be used in this process: it was forked from one that had used a GPU, "
            f"and CUDA does not survive that; {_START_OTHERWISE}"
        )


def _ask(function: str, *arguments: int) -> int | None:
    value, runtime = ffi.new("int *"), load_cudart()[0]
    code = getattr(runtime, function)(value, *arguments)
    cuda_errors.check_lost(runtime, code, function)
    return value[0] if code == 0 else None


def examined(error: KernelError) -> KernelError:
    """An error, or the `DeviceError` that is behind it."""
    return cuda_errors.examine(load_cudart()[0], error, bool(thread.bound))


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
        if _device_count > 1 and hasattr(load_cudart()[0], "cudaStreamGetDevice"):
            streams.device_of = device_of_stream
    return _device_count


def device_of_stream(handle: int) -> int | None:
    """The device of a stream; None while it records a graph, which asking would spoil."""
    runtime, found = load_cudart()[0], ffi.new("int *")
    stream = ffi.cast("void *", handle)
    code = runtime.cudaStreamIsCapturing(stream, found)
    if not code:
        if found[0]:
            return None
        code = runtime.cudaStreamGetDevice(stream, found)
    cuda_errors.check_lost(runtime, code, "the device of a stream")
    return None if code else int(found[0])


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
    refuse_after_fork()
    runtime, current = load_cudart()[0], ffi.new("int *")
    code = runtime.cudaGetDevice(current)
    if code == 0 and current[0] == device and device in bound:
        return None
    code = code or runtime.cudaSetDevice(device)
    if code:
        cuda_errors.check_lost(runtime, code, "cudaSetDevice")
        raise LoaderError(f"cuda:{device} cannot be used: CUDA error {code}{_hint(code)}")
    bound.add(device)
    device_count()  # which says from now on that a GPU is in use
    return None if current[0] == device else int(current[0])


def current_device() -> int:
    """The device that is this thread's current one."""
    runtime, current = load_cudart()[0], ffi.new("int *")
    code = runtime.cudaGetDevice(current)
    if code:
        raise cuda_errors.failed(runtime, code, "cudaGetDevice")
    return int(current[0])


def multiprocessors(device: int) -> int:
    """How many streaming multiprocessors a device has."""
    return _attribute(device, _MULTIPROCESSORS)


def shared_memory(device: int) -> int:
    """How many bytes of shared memory a block can have that asks for them."""
    return _attribute(device, _SHARED_MEMORY)


@functools.cache
def _attribute(device: int, attribute: int) -> int:
    value, count = _ask("cudaDeviceGetAttribute", attribute, device), device_count()
    if value is None:
        runtime = load_cudart()[0]
        hint = _hint(runtime.cudaGetDeviceCount(ffi.new("int *")))
        cuda_errors.forget(runtime)
        if not count and not hint:
            hint = ': `fi-ffi doctor` tells why; with device="cpu" numpy kernels run'
        raise LoaderError(f"there is no cuda:{device}: this process sees {count} GPUs{hint}")
    return value


def _hint(code: int) -> str:
    """What may be behind an error of CUDA's: another library may have used it before a fork."""
    if code != _NOT_INITIALIZED:
        return ""
    return f" (forked from a process that had used CUDA? Then {_START_OTHERWISE})"


def capability(device: int) -> tuple[int, int]:
    """A device's compute capability; `LoaderError` where there is no such device."""
    return _attribute(device, _CAPABILITY_MAJOR), _attribute(device, _CAPABILITY_MINOR)


_forget_cudart = load_cudart.cache_clear


def _cut_off() -> None:
    """In a forked child: what is remembered must not let a call through."""
    global _is_cut_off
    if _device_count:
        _is_cut_off = True
        thread.bound.clear()
        _forget_cudart()
        failure.examine = None


os.register_at_fork(after_in_child=_cut_off)
