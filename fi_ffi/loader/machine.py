"""What this machine is, and which CUDA this process runs on.

Driver and devices are asked of the driver, which is the same for every CUDA; no context is made.
The CUDA runtime is that of the kernels: they name it by file (`libcudart.so.12`, `.so.13`).  A
process has one: kernels of another CUDA are refused before anything is loaded.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fi_ffi.abi import failure, library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import AbiError, KernelError, LoaderError
from fi_ffi.loader import cuda_errors, libraries

CUDA_MAJORS = (13, 12)  # of the kernels that fi_ffi can serve, the preferred first
CPUS = ("x86_64", "aarch64")  # that there are kernels for
DRIVER = "libcuda.so.1"

# CUdevice_attribute of cuda.h
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

_NO_DRIVER = 100  # CUDA_ERROR_NO_DEVICE
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: what a forked child is told
_START_OTHERWISE = (
    "fork before the first use of a GPU, or start processes with multiprocessing's "
    "`spawn` or `forkserver`"
)
# A runtime's file, as a process has it mapped; wheels that bundle one put a hash into its name.
_MAPPED = re.compile(
    r"\s(/\S.*/libcudart(?:-\w+)?\.so\.(\d+)[\w.]*)(?: \(deleted\))?$", re.MULTILINE
)
# Whether this process was forked off another that had used a GPU by then.
_is_cut_off = False

# The runtime that is in use: a cffi library, where it was found, its major version.
_runtime: tuple[Any, str, int] | None = None
_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


def _no_kernels() -> int | None:
    return None


# Tells the major version that the kernels in use are of, or None; the search for them fills it in.
ask_kernels: Callable[[], int | None] = _no_kernels


def cudart(major: int) -> str:
    """The file of a CUDA runtime."""
    return f"libcudart.so.{major}"


def runtimes_in_process() -> dict[int, str]:
    """The CUDA runtimes that are mapped into this process: their files by major version."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return {}
    return {int(major): path for path, major in _MAPPED.findall(maps)}


def majors_here() -> tuple[int, ...]:
    """The major versions of CUDA that kernels may be of in this process, the best first.

    Those that the driver runs; of them that of the runtime which is here, if one is.
    """
    here = (_runtime[2],) if _runtime else tuple(runtimes_in_process())
    driver = driver_version()
    return tuple(
        major for major in CUDA_MAJORS
        if (not here or major in here) and (driver is None or major <= driver[0])
    )  # fmt: skip


def load_cudart() -> tuple[Any, str]:
    """The CUDA runtime as a cffi library, and where it was found.

    That of the kernels in use; where there are none, the best one that is installed here.
    Raises `LoaderError` where there is none.
    """
    if _runtime is None:
        refuse_after_fork()
        here = tuple(runtimes_in_process())
        told = ask_kernels() if len(here) != 1 else None
        if told is None or (here and told not in here):
            majors = here or majors_here() or CUDA_MAJORS[-1:]
        else:
            majors = (told,)
        for major in majors[:-1]:
            try:
                return use_cuda(major)
            except LoaderError:  # the next may be installed
                continue
        return use_cuda(majors[-1])
    return _runtime[:2]


def use_cuda(major: int, wanted_by: str = "") -> tuple[Any, str]:
    """Load the runtime of a CUDA, if it is not here; `wanted_by` is the file that needs it.

    Raises `AbiError` where this process has another, `LoaderError` where it is not installed.
    """
    global _runtime
    with _lock:
        check_cuda(major, wanted_by)
        if _runtime is None or _runtime[2] != major:
            refuse_after_fork()
            found, place = libraries.load(cudart(major))
            _runtime = found, runtimes_in_process().get(major, place), major
            failure.examine = examined
        return _runtime[:2]


def cuda_major() -> int:
    """The major version of the CUDA that this process runs on."""
    load_cudart()
    assert _runtime is not None
    return _runtime[2]


def check_cuda(major: int, wanted_by: str = "") -> None:
    """Raise `AbiError` for a CUDA beside which this process has another."""
    wanted_by = wanted_by or "what is asked for"
    if major not in CUDA_MAJORS:
        raise AbiError(
            f"{wanted_by} needs {cudart(major)}, and fi_ffi serves kernels of CUDA "
            f"{' and '.join(map(str, sorted(CUDA_MAJORS)))}"
        )
    here = {_runtime[2]: _runtime[1]} if _runtime else runtimes_in_process()
    if here and major not in here:
        other, path = next(iter(here.items()))
        raise AbiError(
            f"{wanted_by} needs {cudart(major)}, and this process has {cudart(other)} "
            f"({path}{_torch_here(other)}): a process has one CUDA. Use kernels of CUDA {other} "
            f"here (`fi-ffi build --cuda {other}` makes some), or these in a process of their own"
        )


def _torch_here(major: int) -> str:
    """A remark on the torch that has brought a CUDA, if one has."""
    torch = sys.modules.get("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    if not isinstance(cuda, str) or cuda.partition(".")[0] != str(major):
        return ""
    return f"; torch {getattr(torch, '__version__', '')} is of CUDA {cuda}"


def check_driver(major: int, wanted_by: str) -> None:
    """Raise `LoaderError` where this machine's driver runs no kernels of a CUDA."""
    driver = driver_version()
    if driver is not None and driver[0] < major:
        raise LoaderError(
            f"{wanted_by} is of CUDA {major}, and the driver of this machine is of CUDA "
            f"{driver[0]}.{driver[1]}: update the driver, or use kernels of CUDA {driver[0]} "
            f"(`fi-ffi build --cuda {driver[0]}` makes some, `pip install 'fi-ffi[cu{driver[0]}]'` "
            "brings what they need)"
        )


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


@functools.cache
def load_driver() -> Any:
    """CUDA's driver as a cffi library, or None where there is none."""
    try:
        return ffi.dlopen(DRIVER)
    except OSError:
        return None


def _ask(function: str, *arguments: int) -> tuple[int, int]:
    """What the driver says: an error, 0 for none, and a number."""
    value, driver = ffi.new("int *"), load_driver()
    if driver is None:
        return _NO_DRIVER, 0
    code = driver.cuInit(0) or getattr(driver, function)(value, *arguments)
    return int(code), int(value[0])


def examined(error: KernelError) -> KernelError:
    """An error, or the `DeviceError` that is behind it."""
    return cuda_errors.examine(load_cudart()[0], error, bool(thread.bound))


def driver_version() -> tuple[int, int] | None:
    """The CUDA version the driver supports, or None where there is no driver."""
    driver, value = load_driver(), ffi.new("int *")
    if driver is None or driver.cuDriverGetVersion(value) or not value[0]:
        return None
    return value[0] // 1000, value[0] % 1000 // 10


_device_count = 0


def device_count() -> int:
    """GPUs that this process sees; asked once there is one."""
    global _device_count
    if not _device_count:
        code, count = _ask("cuDeviceGetCount")
        _device_count = 0 if code else count
        if _device_count > 1:
            streams.device_of = device_of_stream
    return _device_count


def device_of_stream(handle: int) -> int | None:
    """The device of a stream; None while it records a graph, which asking would spoil."""
    runtime, found = load_cudart()[0], ffi.new("int *")
    if not hasattr(runtime, "cudaStreamGetDevice"):
        return None
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
    count = device_count()
    code, value = _ask("cuDeviceGetAttribute", attribute, device)
    if code:
        hint = _hint(code)
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


def _cut_off() -> None:
    """In a forked child: what is remembered must not let a call through."""
    global _is_cut_off, _runtime
    if _device_count:
        _is_cut_off = True
        thread.bound.clear()
        _runtime = None
        failure.examine = None


os.register_at_fork(after_in_child=_cut_off)
