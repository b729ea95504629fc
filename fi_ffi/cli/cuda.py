"""The CUDA calls that commands and tests need, through cuda-python.

Import this module only when a GPU is involved: `import cuda.bindings` is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver, runtime

from fi_ffi.abi import failure
from fi_ffi.abi.tensor import TensorDesc, parse_dtype
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import machine
from fi_ffi.reference.arrays import Array

POISON = 0xFF  # every byte of fresh memory; a NaN in each floating-point dtype


class CudaError(FiFfiError, RuntimeError):
    """A call of the CUDA runtime or driver failed."""


def check(result: tuple[Any, ...]) -> Any:
    """Return the value of cuda-python's (error, values...).

    Raises `CudaError`, or `DeviceError` if the GPU is lost.
    """
    error, *values = result
    code = int(error)
    if code != 0:
        runtime.cudaGetLastError()  # clear the error, or the next query would report it
        name = f"{type(error).__name__}.{error.name}"
        if code in failure.STICKY:
            raise failure.lost("a CUDA call", code, name)
        raise CudaError(name)
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability, and memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int


def driver_version() -> tuple[int, int] | None:
    """Return the CUDA version that the driver supports, or None without a driver."""
    try:
        (error,) = driver.cuInit(0)
        if error == driver.CUresult.CUDA_ERROR_NO_DEVICE:
            return _version(check(driver.cuDriverGetVersion()))
        check((error,))
        return _version(check(driver.cuDriverGetVersion()))
    except (RuntimeError, ImportError):
        return None


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def gpus() -> list[Gpu]:
    """Return the GPUs that this process sees; none without a driver."""
    if driver_version() is None:
        return []
    devices = []
    error, count = driver.cuDeviceGetCount()
    for index in range(count if int(error) == 0 else 0):
        # From the driver, which works with any CUDA version.
        device = check(driver.cuDeviceGet(index))
        name, _, _ = check(driver.cuDeviceGetName(256, device)).partition(b"\0")
        memory = int(check(driver.cuDeviceTotalMem(device)))
        devices.append(Gpu(index, name.decode(errors="replace"), machine.capability(index), memory))
    return devices


def require(index: int) -> None:
    """Raise `CudaError` with advice unless this process sees the GPU with this index."""
    devices = gpus()
    if index < len(devices):
        return
    if driver_version() is None:
        raise CudaError(
            f"cuda:{index} is not here: this machine has no CUDA driver. Install NVIDIA's driver, "
            "or use --device cpu, which runs the numpy reference kernels"
        )
    raise CudaError(
        f"cuda:{index} is not here: this process sees {len(devices)} GPU"
        f"{'s' * (len(devices) != 1)}. `fi-ffi doctor` lists them; --device cpu runs the numpy "
        "reference kernels"
    )


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Make a GPU the thread's current one inside the block; restore the previous one."""
    before = check(runtime.cudaGetDevice())
    if before == device:
        yield
        return
    check(runtime.cudaSetDevice(device))
    try:
        yield
    finally:
        check(runtime.cudaSetDevice(before))


class DeviceArray:
    """A GPU copy of a host array, surrounded by poisoned guard bytes.

    `guard` bytes on each side belong to nobody; `intact()` returns whether they are unchanged. The
    thread's current device is preserved.
    """

    def __init__(self, host: Array, *, guard: int = 256, device: int = 0) -> None:
        self.host, self.guard, self.device = host, guard, device
        self._base: Any = 0
        # From the first to the last element, including gaps between rows.
        self.nbytes = sum((n - 1) * s for n, s in zip(host.shape, host.strides, strict=True))
        self.nbytes += host.itemsize if host.size else 0
        with on_device(device):
            self._base = check(runtime.cudaMalloc(self.nbytes + 2 * guard))
            try:
                check(runtime.cudaMemset(self._base, POISON, self.nbytes + 2 * guard))
                self._copy_to(host)
            except FiFfiError:
                self._give_back()
                raise

    @property
    def ptr(self) -> int:
        return int(self._base) + self.guard

    def desc(self) -> TensorDesc:
        """Return a descriptor with the host array's shape and strides."""
        strides = [step // self.host.itemsize for step in self.host.strides]
        dtype = parse_dtype(self.host.dtype)
        return TensorDesc(
            self.ptr, self.host.shape, dtype, strides=strides, device=f"cuda:{self.device}"
        )

    def _copy_to(self, host: Array) -> None:
        rows = np.full(self.nbytes, POISON, np.uint8)
        target: Array = np.ndarray(host.shape, host.dtype, rows.data, strides=host.strides)
        target[...] = host
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(runtime.cudaMemcpy(self.ptr, rows.ctypes.data, self.nbytes, kind))
        # The copy may still be in progress, and other streams do not wait for it.
        check(runtime.cudaStreamSynchronize(runtime.cudaStreamLegacy))

    def _bytes(self, start: int, count: int) -> Array:
        got = np.empty(count, np.uint8)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(runtime.cudaMemcpy(got.ctypes.data, start, count, kind))
        return got

    def get(self) -> Array:
        """Copy the array from the GPU to the host; synchronises with the device."""
        with on_device(self.device):
            check(runtime.cudaDeviceSynchronize())
            buffer = self._bytes(self.ptr, self.nbytes)
        got: Array = np.ndarray(
            self.host.shape, self.host.dtype, buffer.data, strides=self.host.strides
        )
        return got

    def intact(self) -> bool:
        """Return whether the guards and the gaps between elements are unchanged."""
        size = self.nbytes + 2 * self.guard
        with on_device(self.device):
            check(runtime.cudaDeviceSynchronize())
            whole = self._bytes(int(self._base), size)
        mask = np.ones(size, bool)
        inside = np.ndarray(
            (*self.host.shape, self.host.itemsize),
            bool,
            mask.data,
            offset=self.guard,
            strides=(*self.host.strides, 1),
        )
        inside[...] = False
        return bool((whole[mask] == POISON).all())

    def free(self) -> None:
        if self._base:
            with on_device(self.device):
                check(self._give_back())

    def _give_back(self) -> tuple[Any, ...]:
        base, self._base = self._base, 0
        result: tuple[Any, ...] = runtime.cudaFree(base)
        return result
