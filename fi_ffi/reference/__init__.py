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
from fi_ffi.reference import (
    activation,
    attention,
    cascade,
    concat,
    gdn,
    gemm,
    norm,
    norm_fused,
    page,
    quantization,
    rope,
    sampling,
    topk,
)
from fi_ffi.reference.arrays import over_arrays

# What a module was compiled for, where its kernels depend on it: names and values.
Compiled = tuple[tuple[str, object], ...]

_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "norm": norm.KERNELS,
    "page": page.KERNELS,
    "gdn_prefill_sm90": gdn.KERNELS,
    **attention.KERNELS,
}
for _family in (
    activation, cascade, concat, gemm, norm_fused, quantization, rope, sampling, topk
):  # fmt: skip
    for _module, _entries_of in _family.KERNELS.items():
        _KERNELS.setdefault(_module, {}).update(_entries_of)
_lock = threading.Lock()
_entries: dict[tuple[str, str, str, Compiled], Entry] = {}


def kernels() -> dict[str, list[str]]:
    """The entries there are, by module."""
    return {module: sorted(entries) for module, entries in _KERNELS.items()}


def entry(module: str, signature: Signature, kernel: str, compiled: Compiled = ()) -> Entry:
    """The numpy `kernel` of a module, as a TVM-FFI function with that signature.

    `compiled` is for the attention families: `attention.reference_kernel`.
    """
    key = (module, kernel, str(signature), compiled)
    with _lock:
        if key not in _entries:
            function: Any = _KERNELS.get(module, {}).get(kernel)
            if function is None:
                raise KernelNotFoundError(
                    f"{module}.{kernel} has no reference kernel: it runs on CUDA only"
                )
            if module in attention.KERNELS:
                function = attention.reference_kernel(module, kernel, **dict(compiled))
            runtime.ensure_tvm_ffi()
            words = (module, kernel, *(f"{word}_{value}" for word, value in compiled))
            name = ".".join(("fi_ffi.reference", *words))
            _entries[key] = register(name, signature, over_arrays(function))
        return _entries[key]
