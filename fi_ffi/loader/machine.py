"""CUDA on this machine: the driver, the GPUs and the code that they run, and CUDA's libraries.

The driver and the devices are queried through the driver, which is the same for every CUDA version;
no context is created. The CUDA runtime is the one that the kernels name by file (`libcudart.so.12`,
`.so.13`). A process has only one: kernels of another CUDA version are refused before anything is
loaded. A module names CUDA's other libraries by file too, and the dynamic linker takes the library
that this process has under that name. So they are loaded first and globally, from wherever they are
installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fi_ffi.abi import failure, library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import AbiError, ArtifactError, KernelError, LoaderError
from fi_ffi.loader import cuda_errors

CUDA_MAJORS = (13, 12)  # CUDA versions of supported kernels, the preferred one first
CPUS = ("x86_64", "aarch64")  # processors that kernels are built for
DRIVER = "libcuda.so.1"

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

_LIBRARY = r"lib(\w+)\.so\.(\d+)"

# CUdevice_attribute of cuda.h
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

_NO_DRIVER = 100  # CUDA_ERROR_NO_DEVICE
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: returned in a forked child
_START_OTHERWISE = (
    "fork before the first use of a GPU, or start processes with multiprocessing's "
    "`spawn` or `forkserver`"
)
# A runtime's file; wheels that bundle one add a hash to its name.
_RUNTIME = r"libcudart(?:-\w+)?\.so\.(\d+)[\w.]*"
# Whether this process was forked from one that had used a GPU.
_forked_after_cuda = False

# The runtime in use: cffi library, location, major version.
_runtime: tuple[Any, str, int] | None = None
_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


# Returns the CUDA major version of the kernels in use, or None; set by the search for kernels.
ask_kernels: Callable[[], int | None] | None = None


def runtimes_in_process() -> dict[int, str]:
    """Return the CUDA runtimes mapped into this process: files by major version."""
    return {int(major): path for path, major, _ in library.mapped(_RUNTIME)}


def majors_here() -> tuple[int, ...]:
    """Return the CUDA major versions that this process can use, the best first.

    These are the versions that the driver supports, limited to a runtime already in the process.
    """
    here = (_runtime[2],) if _runtime else tuple(runtimes_in_process())
    driver = driver_version()
    able = [major for major in CUDA_MAJORS if driver is None or major <= driver[0]]
    return tuple(major for major in able if not here or major in here)


def load_cudart() -> tuple[Any, str]:
    """Load the CUDA runtime; return it as a cffi library, and where it was found.

    The runtime is that of the kernels in use, or without kernels the best installed one. Raises
    `LoaderError` if there is none.
    """
    if _runtime is None:
        refuse_after_fork()
        here = tuple(runtimes_in_process())
        wanted = ask_kernels() if ask_kernels and len(here) != 1 else None
        if wanted is None or (here and wanted not in here):
            majors = here or majors_here() or CUDA_MAJORS[-1:]
        else:
            majors = (wanted,)
        for major in majors[:-1]:
            try:
                return use_cuda(major)
            except LoaderError:  # another version may be installed
                continue
        return use_cuda(majors[-1])
    return _runtime[:2]


def use_cuda(major: int, wanted_by: str = "") -> tuple[Any, str]:
    """Load the runtime of a CUDA version, if needed; `wanted_by` is the file that needs it.

    Raises `AbiError` if this process has another version, `LoaderError` if it is not installed.
    """
    global _runtime
    with _lock:
        check_cuda(major, wanted_by)
        if _runtime is None or _runtime[2] != major:
            refuse_after_fork()
            found, place = load_library(f"libcudart.so.{major}")
            _runtime = found, runtimes_in_process().get(major, place), major
            failure.examine = root_cause
        return _runtime[:2]


def cuda_major() -> int:
    """Return the CUDA major version of this process."""
    load_cudart()
    assert _runtime is not None
    return _runtime[2]


def check_cuda(major: int, wanted_by: str = "") -> None:
    """Raise `AbiError` if this process has another CUDA version."""
    wanted_by = wanted_by or "this call"
    if major not in CUDA_MAJORS:
        raise AbiError(
            f"{wanted_by} needs libcudart.so.{major}, and fi_ffi serves kernels of CUDA "
            f"{' and '.join(map(str, sorted(CUDA_MAJORS)))}"
        )
    here = {_runtime[2]: _runtime[1]} if _runtime else runtimes_in_process()
    if here and major not in here:
        other, path = next(iter(here.items()))
        raise AbiError(
            f"{wanted_by} needs libcudart.so.{major}, and this process has libcudart.so.{other} "
            f"({path}{_torch_here(other)}): a process has one CUDA. Use kernels of CUDA {other} "
            f"here (`fi-ffi build --cuda {other}` makes some), or these in a process of their own"
        )


def _torch_here(major: int) -> str:
    """Return a remark about torch if it loaded this CUDA version, else ""."""
    torch = sys.modules.get("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    if not isinstance(cuda, str) or cuda.partition(".")[0] != str(major):
        return ""
    return f"; torch {getattr(torch, '__version__', '')} is of CUDA {cuda}"


def check_driver(major: int, wanted_by: str) -> None:
    """Raise `LoaderError` if this machine's driver is too old for kernels of a CUDA version."""
    driver = driver_version()
    if driver is not None and driver[0] < major:
        raise LoaderError(
            f"{wanted_by} is of CUDA {major}, and the driver of this machine is of CUDA "
            f"{driver[0]}.{driver[1]}: update the driver, or use kernels of CUDA {driver[0]} "
            f"(`fi-ffi build --cuda {driver[0]}` makes some, `pip install 'fi-ffi[cu{driver[0]}]'` "
            "brings what they need)"
        )


def package(name: str, major: int) -> str:
    """Return the name of the distribution that provides a library for a CUDA version."""
    return f"{PACKAGES[name]}-cu12" if major == 12 else PACKAGES[name]


@functools.cache
def load_library(file: str) -> tuple[Any, str]:
    """Load a library of CUDA; return it and where it was found.

    A copy in this process comes first, then installed packages, the system, conda and CUDA_HOME. If
    none has it, raises `LoaderError` with the package to install.
    """
    match = re.fullmatch(_LIBRARY, file)
    assert match is not None, file
    # cffi's dlopen would expect dlerror to report a reason, and there is none.
    if library.in_process(file) is not None:
        return ffi.dlopen(file, os.RTLD_NOW | os.RTLD_GLOBAL), "already in this process"
    if match[1] in _FIRST:
        with contextlib.suppress(LoaderError):  # the linker may still find it
            load_library(file.replace(match[1], _FIRST[match[1]]))
    reasons = []
    for path in _library_places(file):
        try:
            found = ffi.dlopen(path, os.RTLD_NOW | os.RTLD_GLOBAL)
        except OSError as error:
            if type(error) is not OSError:  # as cffi's is, unlike a signal handler's TimeoutError
                raise
            reasons.append(str(error).partition("\n")[0])
            continue
        return found, path
    raise _absent(file, match[1], int(match[2]), reasons[0])


def _library_places(file: str) -> Iterator[str]:
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


def load_needed(needed: Iterable[str]) -> None:
    """Load CUDA's other libraries among the files that a module needs.

    Raises `LoaderError` if one is missing.
    """
    for file in needed:
        match = re.fullmatch(_LIBRARY, file)
        if match and match[1] in PACKAGES and match[1] != "cudart":
            load_library(file)


def forked_after_cuda() -> bool:
    """Return whether this process was forked from one that had used a GPU, and can use none.

    The parent's CUDA objects must not be touched in such a process, not even freed.
    """
    return _forked_after_cuda


def refuse_after_fork() -> None:
    """Raise `LoaderError` if this process can use no GPU because of a fork."""
    if _forked_after_cuda:
        raise LoaderError(
            "no GPU can be used in this process: it was forked from one that had used a GPU, "
            f"and CUDA does not survive that; {_START_OTHERWISE}"
        )


@functools.cache
def load_driver() -> Any:
    """Return CUDA's driver as a cffi library, or None without a driver."""
    try:
        return ffi.dlopen(DRIVER)
    except OSError as error:
        if type(error) is not OSError:  # see `load_library`
            raise
        return None


def _ask(function: str, *arguments: int) -> tuple[int, int]:
    """Query the driver; return its error code (0 for success) and a number."""
    value, driver = ffi.new("int *"), load_driver()
    if driver is None:
        return _NO_DRIVER, 0
    code = driver.cuInit(0) or getattr(driver, function)(value, *arguments)
    return int(code), int(value[0])


def root_cause(error: KernelError) -> KernelError:
    """Return an error, or the `DeviceError` that caused it."""
    return cuda_errors.examine(load_cudart()[0], error, bool(thread.bound))


def driver_version() -> tuple[int, int] | None:
    """Return the CUDA version that the driver supports, or None without a driver."""
    driver, value = load_driver(), ffi.new("int *")
    if driver is None or driver.cuDriverGetVersion(value) or not value[0]:
        return None
    return value[0] // 1000, value[0] % 1000 // 10


_device_count = 0


def device_count() -> int:
    """Return the number of GPUs that this process sees, cached unless it is 0."""
    global _device_count
    if not _device_count:
        code, count = _ask("cuDeviceGetCount")
        _device_count = 0 if code else count
        if _device_count > 1:
            streams.device_of = device_of_stream
    return _device_count


def device_of_stream(handle: int) -> int | None:
    """Return a stream's device; None during its capture, which the query would invalidate."""
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
        self.bound: set[int] = set()  # devices whose context this thread has
        self.slots: list[Any] = []  # for `_get_device`; one that is in use is not here


thread = _Thread()


def _get_device() -> int:
    """Return this thread's current device, or a CUDA error code as a negative number."""
    slots = thread.slots
    # A signal handler may ask in between, and takes another slot.
    slot = slots.pop() if slots else ffi.new("int *")
    found: int = -load_cudart()[0].cudaGetDevice(slot) or slot[0]
    slots.append(slot)
    return found


def is_current(device: int) -> bool:
    """Whether a device is this thread's current one, and the thread has its context."""
    # A single device is always current.
    return device in thread.bound and (_device_count == 1 or _get_device() == device)


def make_current(device: int) -> int | None:
    """Make a device this thread's current one; return the previous one, or None if unchanged.

    A device that this thread has not used yet is set even if it is current: only that gives the
    thread its context. Kernels that encode TMA descriptors need the context before the launch;
    without one the encoding fails and the kernel is launched with invalid descriptors.
    """
    if is_current(device):
        return None
    refuse_after_fork()
    runtime, before = load_cudart()[0], _get_device()
    code = -before if before < 0 else runtime.cudaSetDevice(device)
    if code:
        cuda_errors.check_lost(runtime, code, "cudaSetDevice")
        capability(device)  # raises if there is no such device
        raise LoaderError(f"cuda:{device} cannot be used: CUDA error {code}{_hint(code)}")
    thread.bound.add(device)
    device_count()  # sets the cached number, which marks that a GPU is in use
    return None if before == device else before


def current_device() -> int:
    """Return this thread's current device."""
    device = _get_device()
    if device < 0:
        raise cuda_errors.failed(load_cudart()[0], -device, "cudaGetDevice")
    return device


def multiprocessors(device: int) -> int:
    """Return a device's number of streaming multiprocessors."""
    return _attribute(device, _MULTIPROCESSORS)


def shared_memory(device: int) -> int:
    """Return the bytes of shared memory that a block can opt in to."""
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
    """Return a possible reason for a CUDA error: a fork after another library had used CUDA."""
    if code != _NOT_INITIALIZED:
        return ""
    return f" (forked from a process that had used CUDA? Then {_START_OTHERWISE})"


def capability(device: int) -> tuple[int, int]:
    """Return a device's compute capability; `LoaderError` if there is no such device."""
    return _attribute(device, _CAPABILITY_MAJOR), _attribute(device, _CAPABILITY_MINOR)


# Tegra GPUs: machine code of another minor version is not guaranteed to run there, nor vice versa.
_JETSONS = ((7, 2), (8, 7))
Suffix = Literal["", "a", "f"]


@dataclass(frozen=True)
class CudaCode:
    """One architecture that device code was compiled for."""

    kind: Literal["sass", "ptx"]
    """"sass" is machine code, "ptx" is compiled by the driver when it is loaded."""
    sm: int
    """Ten times the compute capability: 90 for 9.0."""
    suffix: Suffix = ""
    """"a": for this architecture only; "f": for its family; "": for later ones too."""

    @property
    def name(self) -> str:
        """The name in nvcc's `-gencode ...,code=`: "sm_90a", "compute_90a"."""
        return f"{'sm' if self.kind == 'sass' else 'compute'}_{self.sm}{self.suffix}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether a device of this (major, minor) compute capability can run the code."""
        made_for = divmod(self.sm, 10)
        is_sass = self.kind == "sass"
        is_exact = is_sass and (capability in _JETSONS or made_for in _JETSONS)
        if self.suffix == "a" or is_exact:
            return capability == made_for
        if self.suffix == "f" or is_sass:
            return capability[0] == made_for[0] and capability[1] >= made_for[1]
        return capability >= made_for


_ARCHITECTURE = r"(?:sm_?)?(\d{1,2})\.?(\d)([af]?)"


def architecture_named(name: str) -> tuple[int, int, Suffix] | None:
    """Return the architecture that a person names: 90a, 9.0a, sm90a and sm_90a are one.

    The parts are the compute capability and the suffix. Every option and argument that takes a GPU
    is read by this; None is for a text that names none.
    """
    found = re.fullmatch(_ARCHITECTURE, name.strip(), re.ASCII | re.IGNORECASE)
    return found and (int(found[1]), int(found[2]), cast(Suffix, found[3].lower()))


def sass_named(name: str) -> CudaCode:
    """Return the machine code for an architecture's name."""
    found = architecture_named(name)
    if found is None:
        raise ArtifactError(f"{name!r} names no architecture; one looks like sm90a")
    major, minor, suffix = found
    return CudaCode("sass", 10 * major + minor, suffix)


def unfit(codes: Iterable[CudaCode], capability: tuple[int, int]) -> str:
    """Return why no device of this compute capability runs any of the codes; "" if one does."""
    codes = tuple(codes)
    if any(code.runs_on(capability) for code in codes):
        return ""
    has = f"{', '.join(code.name for code in codes)} only" if codes else "no device code"
    return "has {}; the device is sm_{}{}".format(has, *capability)


def _reset_after_fork() -> None:
    """Reset this module's state in a forked child, so that every CUDA call is refused."""
    global _forked_after_cuda, _runtime
    if _device_count:
        _forked_after_cuda = True
        thread.bound.clear()
        _runtime = None
        failure.examine = None


os.register_at_fork(after_in_child=_reset_after_fork)
