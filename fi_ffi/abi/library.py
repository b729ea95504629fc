"""libtvm_ffi and the C library, as this process has them.

The loader finds and opens the files; this module is where the rest of the ABI
room calls them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import AbiError, LoaderError

# Linux dlfcn.h, the same on x86_64 and aarch64.
RTLD_LAZY, RTLD_NOW, RTLD_LOCAL, RTLD_GLOBAL = 0x1, 0x2, 0x0, 0x100

# What the structures in declarations.h must measure for any of this to be safe.
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


# More than any process can address: a size that is none.
MAX_BYTES = 1 << 48

# By its own account, which is its headers'.  TVMFFIErrorCell was shorter before 0.1.8;
# within 0.1 the interface has only grown since.
_OLDEST, _TOO_NEW = (0, 1, 8), (0, 2, 0)


class TypeIndex:
    """`TVMFFITypeIndex` of tvm/ffi/c_api.h: what the first word of a `TVMFFIAny` says."""

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
    OBJECT_BEGIN = 64  # this and above: a reference-counted object
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


class _Unattached:
    def __getattr__(self, name: str) -> Any:
        raise LoaderError(f"{name} was called before libtvm_ffi was loaded")


lib: Any = _Unattached()

# libtvm_ffi leaves the locking of its tables of functions and types to its callers, and a cffi
# call runs without the GIL.  What a library registers it registers while it is loaded.
tables = threading.RLock()


@functools.cache
def c_library() -> Any:
    """The running process as a library: libc's dlopen and dlsym, Python's own C API."""
    return ffi.dlopen(None)


def attach(path: str, through: str | None = None) -> tuple[int, int, int]:
    """Load libtvm_ffi from `path`, globally, for the whole process; returns its version.

    `through` is another name of the same file, which it is opened by.

    Kernels do not name libtvm_ffi among the libraries they need: they find it
    because it was loaded with RTLD_GLOBAL before them.
    """
    global lib
    try:
        loaded = ffi.dlopen(through or path, RTLD_NOW | RTLD_GLOBAL)
        version = ffi.new("TVMFFIVersion *")
        loaded.TVMFFIGetVersion(version)
    except (OSError, AttributeError) as error:
        told = str(error).replace(through or path, path)
        raise LoaderError(f"{path} does not load as libtvm_ffi: {told}") from error
    found = version.major, version.minor, version.patch
    if not _OLDEST <= found < _TOO_NEW:
        told = ".".join(map(str, found))
        raise LoaderError(f"{path} is libtvm_ffi {told}, and fi_ffi works with 0.1.8 to 0.1.x")
    lib = loaded
    return found


def open_global(path: str, through: str | None = None) -> None:
    """dlopen a library whose symbols serve what is loaded after it; it is never closed.

    `through` is another name of the same file, which it is opened by.  Raises
    `LoaderError` with the dynamic linker's own words.
    """
    _dlopen(path, through, RTLD_NOW | RTLD_GLOBAL)


def open_module(path: str, through: str | None = None, *, lazily: bool = False) -> Any:
    """dlopen a kernel module, its symbols local to it; it is never closed.

    `through` is another name of the same file, which it is opened by.  A function that nothing
    defines is an error; `lazily`, the process ends where one is called.  Raises
    `LoaderError` with the dynamic linker's own words.
    """
    return _dlopen(path, through, (RTLD_LAZY if lazily else RTLD_NOW) | RTLD_LOCAL)


def _dlopen(path: str, through: str | None, mode: int) -> Any:
    c = c_library()
    c.dlerror()  # looks the function up, which would forget the error later on
    with tables:
        handle = c.dlopen(os.fsencode(through or path), mode)
    if handle == ffi.NULL:
        raise LoaderError(f"{path} does not load: {_dlerror().replace(through or path, path)}")
    return handle


def in_process(file: str) -> Any | None:
    """The handle of a library that is loaded under this name, or None."""
    handle = c_library().dlopen(os.fsencode(file), RTLD_NOW | os.RTLD_NOLOAD)
    return None if handle == ffi.NULL else handle


def find_symbol(module: Any, name: str) -> Any | None:
    """The address of an exported symbol, or None."""
    c = c_library()
    c.dlerror()
    address = c.dlsym(module, name.encode())
    return None if address == ffi.NULL else address


def is_of_libtvm_ffi(address: Any) -> bool:
    """Whether an address of code lies in libtvm_ffi."""
    found, own = ffi.new("FiFfiDlInfo *"), ffi.new("FiFfiDlInfo *")
    c = c_library()
    anchor = ffi.cast("void *", ffi.addressof(lib, "TVMFFIGetVersion"))
    told = c.dladdr(ffi.cast("void *", address), found) and c.dladdr(anchor, own)
    return bool(told) and found.dli_fbase == own.dli_fbase


def _dlerror() -> str:
    text = c_library().dlerror()
    return "no reason given" if text == ffi.NULL else ffi.string(text).decode(errors="replace")


def byte_array(text: bytes) -> tuple[Any, Any]:
    """A `TVMFFIByteArray *` over a copy of `text`, and the buffer that must outlive it."""
    buffer = ffi.new("char[]", text or b"\0")
    array = ffi.new("TVMFFIByteArray *", {"data": buffer, "size": len(text)})
    return array, buffer


def read_bytes(array: Any) -> bytes:
    """The bytes a `TVMFFIByteArray` names; `AbiError` where they are more than can be."""
    size = array.size
    if size == 0 or array.data == ffi.NULL:
        return b""
    if size > MAX_BYTES:
        raise AbiError(f"a TVM-FFI byte array of {size} bytes")
    return bytes(ffi.buffer(array.data, size))


def aligned(count: int, alignment: int) -> Any:
    """A block of libc's memory, as a C pointer; `c_library().free` takes it back.

    Not Python's: a callee may read it after the interpreter has gone.
    """
    block = c_library().aligned_alloc(alignment, -(-max(count, 1) // alignment) * alignment)
    if block == ffi.NULL:
        raise MemoryError(f"{count} bytes of host memory")
    return block


def address_of(pointer: Any) -> int:
    """A C pointer as an int."""
    return int(ffi.cast("uintptr_t", pointer))


def type_index_of(handle: Any) -> int:
    """The type index in an object's header."""
    return int(ffi.cast("TVMFFIObject *", handle).type_index)


def references(handle: Any) -> int:
    """How many strong references to an object there are."""
    return int(ffi.cast("TVMFFIObject *", handle).combined_ref_count & 0xFFFFFFFF)


def renew_after_fork(names: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Give a forked child a new lock in place of the one that a module calls `name`.

    The thread that held the lock is not in the child to give it back.
    """
    os.register_at_fork(after_in_child=lambda: names.update({name: make()}))


renew_after_fork(globals(), "tables", threading.RLock)
