"""Handles of CUDA's libraries, for kernels that are given one: made when first needed."""

from __future__ import annotations

import threading

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import KernelError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda

_lock = threading.Lock()
# By library and device.  Kept for the life of the process: at its end the device's context may
# be gone before them.  Threads share them: cuBLASLt's have no state that a call could change.
_handles: dict[tuple[str, Device], int] = {}


def own_handle(library: str, device: Device) -> int:
    """fi_ffi's handle of a library on a device; 0 on the CPU, which has none.

    Raises `LoaderError` where the library is not installed, `KernelError` where it refuses.
    """
    if not device.is_cuda:
        return 0
    key = (library, device)
    with _lock:
        if key not in _handles:
            _handles[key] = _MAKERS[library](device)
        return _handles[key]


def _cublas_lt(device: Device) -> int:
    from fi_ffi.loader import libraries  # not above: few programs need it

    cublas, slot = libraries.load(libraries.CUBLAS_LT)[0], ffi.new("void **")
    with cuda.current(device), cuda.relaxed():
        status = cublas.cublasLtCreate(slot)
    if status:
        words = f"cuBLAS status {status} on {device}"
        raise machine.examined(KernelError("cublasLtCreate", "RuntimeError", words))
    return int(ffi.cast("uintptr_t", slot[0]))


_MAKERS = {"cublasLt": _cublas_lt}
