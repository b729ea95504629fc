"""A copy for each GPU of kernel files whose static variables are valid for one GPU only.

Some of FlashInfer's launchers store in static variables that a kernel was allowed its shared memory
(`is_initialized` of gdn_prefill_sm90 up to 0.6.13, and of kernels for SM100), or the address of its
counters (`tbAssign` of POD). On a process's second GPU the launch is then refused ("run failed"),
or the kernel writes to the first GPU's memory. Therefore a process that sees several GPUs loads a
copy of such a file for each further GPU that runs its functions.

By default all copies of a file in a process share such a variable (STB_GNU_UNIQUE). The copy's
symbol table is changed to make the variable an ordinary one, local to each copy.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry
from fi_ffi.loader import kernels, machine
from fi_ffi.loader.elf import FUNCTION_PREFIX, SYMBOL, open_section
from fi_ffi.loader.kernels import ModuleFile

# Modules that may have such variables: only their symbol tables are read.
_MODULES = re.compile(
    r"gdn_prefill_sm90|pod_with_kv_cache_.*|fmha_cutlass_sm\d+\w*|mla(_sm\d+\w*)?"
)
# A static variable of a function, mangled: the function, then the variable's name.
_VARIABLE = re.compile(
    rb"_ZZ[\w.$]*?E(?:14is_initializedEbE11initialized|8tbAssign)(?:_\d|__\d+_)?(?=\0)"
)
_STB_GLOBAL, _STB_GNU_UNIQUE = 1, 10
_INFO = 4  # offset of st_info in a symbol

_lock = threading.Lock()
library.renew_after_fork(globals(), "_lock", threading.Lock)
# by the file's sha256; None for a file without such variables
_copies: dict[str, Copies | None] = {}

Call = Callable[[Any, Any, int, Any], int]


class Copies:
    """A kernel file, loaded once for each GPU; the first GPU uses the file itself."""

    def __init__(self, file: ModuleFile, handle: Any, variables: list[int]) -> None:
        self._file, self._handle, self._variables = file, handle, variables
        self._lock = threading.RLock()  # reentrant: a signal handler may launch
        self._by_device: dict[int, Any] = {}

    def handle(self, device: int) -> Any:
        """Return the dlopen handle of a GPU's copy."""
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._open_copy() if self._by_device else self._handle
            return self._by_device[device]

    def function(self, symbol: str) -> Call:
        """Return a function that calls the copy of the GPU that is current at the call."""
        calls: dict[int, Call] = {}

        def dispatch(handle: Any, args: Any, count: int, result: Any) -> int:
            device = machine.current_device()
            call = calls.get(device)
            if call is None:
                owner = self.handle(device)
                address = library.find_symbol(owner, FUNCTION_PREFIX + symbol)
                call = calls[device] = Entry(symbol, address, owner=owner).address
            return call(handle, args, count, result)

        return dispatch

    def _open_copy(self) -> Any:
        path = self._file.path
        # Kept open: the dynamic linker identifies the copy by the descriptor's name.
        fd = os.memfd_create(path.name, os.MFD_CLOEXEC)
        source = kernels.descriptor(self._file.sha256)
        with mmap.mmap(source, 0, access=mmap.ACCESS_COPY) as content:
            if hashlib.sha256(content).hexdigest() != self._file.sha256:
                raise kernels.changed(path, "after this process had loaded it")
            for at in self._variables:
                if content[at] >> 4 == _STB_GNU_UNIQUE:
                    content[at] = _STB_GLOBAL << 4 | content[at] & 0xF
            with open(fd, "wb", closefd=False) as copy:
                copy.write(content)
        # lazily: undefined symbols were checked when the file itself was loaded.
        return library.open_module(str(path), f"/proc/self/fd/{fd}", lazily=True)


def on_each_gpu(file: ModuleFile, handle: Any, symbol: str, call: Call) -> Call:
    """Wrap a function of a loaded kernel file, if it may be called on several GPUs."""
    if not _MODULES.fullmatch(file.path.stem) or machine.device_count() < 2:
        return call
    with _lock:
        if file.sha256 not in _copies:
            found = variables(file)
            _copies[file.sha256] = Copies(file, handle, found) if found else None
        copies = _copies[file.sha256]
    return call if copies is None else copies.function(symbol)


def variables(file: ModuleFile) -> list[int]:
    """Return the offsets, in a loaded file, of the st_info of variables valid for one GPU only."""
    name = f"/proc/self/fd/{kernels.descriptor(file.sha256)}"
    with open_section(name, ".dynstr") as names:
        text = b"" if names is None else names.at(0, names.size)
    wanted = {match.start() for match in _VARIABLE.finditer(text)}
    if not wanted:
        return []
    with open_section(name, ".dynsym") as symbols:
        assert symbols is not None  # because it has their names
        table = enumerate(SYMBOL.iter_unpack(symbols.at(0, symbols.size)))
        return [symbols.start + i * SYMBOL.size + _INFO for i, (at, *_) in table if at in wanted]
