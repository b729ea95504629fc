"""libtvm_ffi and the C library of this process.

The loader finds and opens the files; the rest of `fi_ffi.abi` calls them through this module.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import AbiError, LoaderError, let_through

# Linux dlfcn.h; equal on x86_64 and aarch64.
RTLD_LAZY, RTLD_NOW, RTLD_LOCAL, RTLD_GLOBAL = 0x1, 0x2, 0x0, 0x100

# Sizes that the structures of declarations.h must have on this platform.
_SIZES = {
    "TVMFFIAny": 16,
    "TVMFFIObject": 24,
    "TVMFFIByteArray": 16,
    "TVMFFIErrorCell": 72,
    "TVMFFIFunctionCell": 16,
    "DLTensor": 48,
    "DLManagedTensor": 64,
    "DLManagedTensorVersioned": 80,
}
for _name, _size in _SIZES.items():
    if ffi.sizeof(_name) != _size:
        raise AbiError(f"{_name} is {ffi.sizeof(_name)} bytes on this platform, not {_size}")


# More than a process can address; a larger size is corrupt.
MAX_BYTES = 1 << 48

# Versions of libtvm_ffi, as the library reports them. TVMFFIErrorCell was shorter before 0.1.8;
# releases of 0.1 have only added to the interface since.
_OLDEST, _TOO_NEW = (0, 1, 8), (0, 2, 0)


class TypeIndex:
    """`TVMFFITypeIndex` of tvm/ffi/c_api.h: the first word of a `TVMFFIAny`."""

    NONE = 0
    INT = 1
    BOOL = 2
    FLOAT = 3
    OPAQUE_PTR = 4
    DATA_TYPE = 5
    DEVICE = 6
    DL_TENSOR_PTR = 7
    RAW_STR = 8
    BYTE_ARRAY_PTR = 9
    SMALL_STR = 11
    SMALL_BYTES = 12
    OBJECT_BEGIN = 64  # first index of the reference-counted objects
    STR = 65
    BYTES = 66
    ERROR = 67
    FUNCTION = 68
    SHAPE = 69
    TENSOR = 70
    ARRAY = 71
    MAP = 72
    MODULE = 73
    LIST = 75
    DICT = 76


# The running process: libc's dlopen and dlsym, Python's C API.
c_library: Any = ffi.dlopen(None)


class _Unattached:
    def __getattr__(self, name: str) -> Any:
        raise LoaderError(f"{name} was called before libtvm_ffi was loaded")


lib: Any = _Unattached()

# Guards libtvm_ffi's tables of functions and types: the library leaves locking to its callers, and
# cffi calls run without the GIL. dlopen takes the lock too, since libraries register while they
# load.
tables = threading.RLock()


def attach(path: str, through: str | None = None) -> tuple[int, int, int]:
    """Load libtvm_ffi from `path` for the whole process and return its version.

    `through` is another name of the same file, passed to dlopen instead of `path`. Kernels do not
    list libtvm_ffi among the libraries they need. They find its symbols because it was loaded first
    with RTLD_GLOBAL.
    """
    global lib
    try:
        loaded = ffi.dlopen(through or path, RTLD_NOW | RTLD_GLOBAL)
        version = ffi.new("TVMFFIVersion *")
        loaded.TVMFFIGetVersion(version)
    except (OSError, AttributeError) as error:
        reason = str(error).replace(through or path, path)
        raise LoaderError(f"{path} does not load as libtvm_ffi: {reason}") from error
    found = version.major, version.minor, version.patch
    if not _OLDEST <= found < _TOO_NEW:
        text = ".".join(map(str, found))
        raise LoaderError(f"{path} is libtvm_ffi {text}, and fi_ffi works with 0.1.8 to 0.1.x")
    lib = loaded
    return found


def open_module(
    path: str, through: str | None = None, *, lazily: bool = False, globally: bool = False
) -> Any:
    """Load a library; it is never closed.

    `through` is another name of the same file, passed to dlopen instead of `path`. An undefined
    function raises `LoaderError` with the dynamic linker's message. With `lazily`, the process ends
    when the undefined function is called. Later libraries use the symbols of one that is loaded
    `globally`; a module keeps its own.
    """
    mode = (RTLD_LAZY if lazily else RTLD_NOW) | (RTLD_GLOBAL if globally else RTLD_LOCAL)
    # cffi resolves dlerror at its first use; resolving it later would clear the error
    c_library.dlerror()
    with tables:
        handle = c_library.dlopen(os.fsencode(through or path), mode)
    if handle == ffi.NULL:
        raise LoaderError(f"{path} does not load: {_dlerror().replace(through or path, path)}")
    return handle


def in_process(file: str) -> Any | None:
    """Return the handle of a library that is already loaded under this name, or None."""
    handle = c_library.dlopen(os.fsencode(file), RTLD_NOW | os.RTLD_NOLOAD)
    return None if handle == ffi.NULL else handle


def mapped(pattern: str) -> list[tuple[str, ...]]:
    """Return the files mapped into this process whose names match a pattern.

    Each has its path, the pattern's groups, and " (deleted)" or "".
    """
    try:
        with open("/proc/self/maps", errors="replace") as file:
            maps = file.read()
    except OSError as error:
        let_through(error)
        return []
    return re.findall(rf"\s(/\S.*/{pattern})( \(deleted\))?$", maps, re.MULTILINE)


def find_symbol(module: Any, name: str) -> Any | None:
    """Return the address of an exported symbol, or None."""
    c_library.dlerror()
    address = c_library.dlsym(module, name.encode())
    return None if address == ffi.NULL else address


def is_of_libtvm_ffi(address: Any) -> bool:
    """Return whether a code address lies in libtvm_ffi."""
    found, own = ffi.new("FiFfiDlInfo *"), ffi.new("FiFfiDlInfo *")
    anchor = ffi.cast("void *", ffi.addressof(lib, "TVMFFIGetVersion"))
    code = ffi.cast("void *", address)
    is_known = c_library.dladdr(code, found) and c_library.dladdr(anchor, own)
    return bool(is_known) and found.dli_fbase == own.dli_fbase


def _dlerror() -> str:
    text = c_library.dlerror()
    return "no reason given" if text == ffi.NULL else ffi.string(text).decode(errors="replace")


def byte_array(text: bytes) -> tuple[Any, Any]:
    """Return a `TVMFFIByteArray *` over a copy of `text`, and the buffer that must outlive it."""
    buffer = ffi.new("char[]", text or b"\0")
    array = ffi.new("TVMFFIByteArray *", {"data": buffer, "size": len(text)})
    return array, buffer


def read_bytes(array: Any) -> bytes:
    """Return the bytes that a `TVMFFIByteArray` refers to; `AbiError` if its size is corrupt."""
    size = array.size
    if size == 0 or array.data == ffi.NULL:
        return b""
    if size > MAX_BYTES:
        raise AbiError(f"a TVM-FFI byte array of {size} bytes")
    return bytes(ffi.buffer(array.data, size))


def aligned(count: int, alignment: int) -> Any:
    """Allocate an aligned block of libc's memory; free it with `c_library.free`.

    Python's own memory would not do: a callee may read the block after the interpreter has ended.
    """
    block = c_library.aligned_alloc(alignment, -(-max(count, 1) // alignment) * alignment)
    if block == ffi.NULL:
        raise MemoryError(f"{count} bytes of host memory")
    return block


def address_of(pointer: Any) -> int:
    """Return a C pointer as an int."""
    return int(ffi.cast("uintptr_t", pointer))


def type_index_of(handle: Any) -> int:
    """Return the type index in an object's header."""
    return int(ffi.cast("TVMFFIObject *", handle).type_index)


def references(handle: Any) -> int:
    """Return the number of strong references to an object."""
    return int(ffi.cast("TVMFFIObject *", handle).combined_ref_count & 0xFFFFFFFF)


def import_whole(name: str) -> Any:
    """Import a module late, without garbage being collected meanwhile.

    A `__del__` that calls fi_ffi would find the module half made on this thread. Other threads
    wait. A signal handler cannot: for its call, `LoaderError`.
    """
    module = sys.modules.get(name)
    if module is None or module.__spec__._initializing:  # type: ignore[union-attr]
        was_enabled = gc.isenabled()
        try:
            gc.disable()
            module = importlib.import_module(name)
        finally:
            if was_enabled:
                gc.enable()
        if module.__spec__._initializing:  # type: ignore[union-attr]
            raise LoaderError(f"{name} is still being imported by this thread: call again after it")
    return module


def renew_after_fork(names: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Replace the lock `name` of a module's globals by a new one in a forked child.

    In the child, the thread that held the lock no longer exists to release it.
    """
    os.register_at_fork(after_in_child=lambda: names.update({name: make()}))


renew_after_fork(globals(), "tables", threading.RLock)
