"""Kernels in numpy behind the same ABI: what runs where there is no GPU.

Each is registered as a TVM-FFI function, so that a call on CPU tensors goes
through the same checks, packing, library call and error decoding as one on a
GPU.  They are also what the GPU tests compare with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.loader import runtime
from fi_ffi.reference import norm
from fi_ffi.reference.arrays import over_arrays

_KERNELS: dict[str, dict[str, Callable[..., None]]] = {"norm": norm.KERNELS}
_lock = threading.Lock()
_entries: dict[tuple[str, str, str], Entry] = {}


def kernels() -> dict[str, list[str]]:
    """The entries there are, by module."""
    return {module: sorted(entries) for module, entries in _KERNELS.items()}


def entry(module: str, signature: Signature, kernel: str) -> Entry:
    """The numpy `kernel` of a module, as a TVM-FFI function with that signature."""
    key = (module, kernel, str(signature))
    with _lock:
        if key not in _entries:
            function: Any = _KERNELS.get(module, {}).get(kernel)
            if function is None:
                raise KernelNotFoundError(
                    f"{module}.{kernel} has no reference kernel: it runs on CUDA only"
                )
            runtime.ensure_tvm_ffi()
            name = f"fi_ffi.reference.{module}.{kernel}"
            _entries[key] = register(name, signature, over_arrays(function))
        return _entries[key]
