"""What this process has loaded: libtvm_ffi, the CUDA runtime, kernel modules.

Everything is loaded on demand, once, under a lock, and never unloaded; a call
that finds its entry here takes no lock.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, probe
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import tvm_ffi
from fi_ffi.loader.elf import FUNCTION_PREFIX, inspect_elf
from fi_ffi.loader.kernels import KernelSource, open_source

ENVIRONMENT = "FI_FFI_KERNELS"

_lock = threading.RLock()
_source: KernelSource | None = None
_modules: dict[str, tuple[Any, Path]] = {}
_entries: dict[tuple[str, str], Entry] = {}
_tvm_ffi: tvm_ffi.Found | None = None
_tvm_ffi_version: tuple[int, int, int] = (0, 0, 0)
_cudart: str | None = None


def use_source(location: str | os.PathLike[str]) -> KernelSource:
    """Take kernels from `location` from now on; loaded modules stay as they are mapped."""
    global _source
    source = open_source(location)
    with _lock:
        _source = source
        _modules.clear()
        _entries.clear()
    return source


def source() -> KernelSource:
    """The source in use: the one chosen, or that of `FI_FFI_KERNELS`."""
    global _source
    with _lock:
        if _source is None:
            location = os.environ.get(ENVIRONMENT)
            if not location:
                raise KernelNotFoundError(
                    f"no kernels: set {ENVIRONMENT} or call fi_ffi.use_kernels(...) with a "
                    "directory or a flashinfer_jit_cache wheel; `fi-ffi build norm` makes one"
                )
            _source = open_source(location)
        return _source


def ensure_tvm_ffi() -> tvm_ffi.Found:
    """Load libtvm_ffi, globally, once."""
    global _tvm_ffi, _tvm_ffi_version
    if _tvm_ffi is None:
        with _lock:
            if _tvm_ffi is None:
                found = tvm_ffi.find()
                _tvm_ffi_version = library.attach(found.path)
                _tvm_ffi = found
    return _tvm_ffi


def tvm_ffi_version() -> tuple[int, int, int]:
    """The version libtvm_ffi gives of itself; its header's, which may lead the package's."""
    ensure_tvm_ffi()
    return _tvm_ffi_version


def ensure_cudart() -> str:
    """Load the CUDA runtime the kernels need; returns where it was found."""
    global _cudart
    if _cudart is None:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

        with _lock:
            try:
                loaded = load_nvidia_dynamic_lib("cudart")
            except DynamicLibNotFoundError as error:
                raise LoaderError(
                    "libcudart.so.13 was not found: `pip install 'nvidia-cuda-runtime>=13,<14'`, "
                    f"or set CUDA_HOME to a CUDA 13 toolkit ({error})"
                ) from error
            _cudart = str(loaded.abs_path or "already in this process")
    return _cudart


def open_module(module: str) -> tuple[Any, Path]:
    """The handle and file of a module of the source in use."""
    with _lock:
        if module not in _modules:
            path = source().path(module)
            ensure_tvm_ffi()
            ensure_cudart()
            _modules[module] = (library.open_module(str(path)), path)
        return _modules[module]


def kernel_entry(module: str, declared: Signature, releases: str) -> Entry:
    """An entry of a module, attested: the binary's own signature is the declared one.

    Raises `AbiError` with both signatures where they differ, and calls nothing.
    """
    key = (module, str(declared))
    entry = _entries.get(key)
    if entry is None:
        with _lock:
            handle, path = open_module(module)
            entry = _exported(handle, path, declared.name)
            entry.name = f"{module}.{declared.name}"
            found = probe(entry)
            if not found.same_types(declared):
                raise AbiError(
                    f"{entry.name}: the binary does not have the declared interface\n"
                    f"  declared (FlashInfer {releases}): {declared}\n"
                    f"  binary (FlashInfer {source().release or 'of unknown release'}): {found}\n"
                    f"  file: {path}"
                )
            _entries[key] = entry
    return entry


def _exported(handle: Any, path: Path, symbol: str) -> Entry:
    address = library.find_symbol(handle, FUNCTION_PREFIX + symbol)
    if address is None:
        names = ", ".join(inspect_elf(path).functions)
        raise KernelNotFoundError(f"{path} exports no {symbol!r}; it exports: {names or 'none'}")
    return Entry(symbol, address, owner=handle)


def file_signatures(path: str | os.PathLike[str]) -> dict[str, Signature | str]:
    """The signature of every function a .so exports, asked of the functions themselves.

    One that has none (it takes any arguments) has the reason, a string, instead.
    Loads the file into this process; needs no GPU.
    """
    where = Path(path).resolve()
    functions = inspect_elf(where).functions
    with _lock:
        ensure_tvm_ffi()
        ensure_cudart()
        handle = library.open_module(str(where))
    found: dict[str, Signature | str] = {}
    for name in functions:
        try:
            found[name] = probe(_exported(handle, where, name))
        except AbiError as error:
            found[name] = str(error)
    return found
