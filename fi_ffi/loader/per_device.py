"""Variables of kernel files that are right for one GPU only, kept apart for each GPU.

Some of FlashInfer's launchers remember in a static variable what holds for one device: that a
kernel was allowed its shared memory (`is_initialized` of gdn_prefill_sm90 up to 0.6.13, and of
kernels for SM100), or where its counters lie (`tbAssign` of POD).  On a process' second GPU the
launch is then refused ("run failed"), or the kernel writes to the first one's memory.  These
variables are in the file's symbol table, so whoever calls can give each GPU its own.

Nothing is done where a process sees one GPU.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.loader import cuda_errors, machine
from fi_ffi.loader.elf import open_section

# Modules that may have some: their symbol tables are read.
_MODULES = re.compile(
    r"gdn_prefill_sm90|pod_with_kv_cache_.*|fmha_cutlass_sm\d+\w*|mla(_sm\d+\w*)?"
)
# A static variable of a function, mangled: the function, then the variable's name.
_VARIABLE = re.compile(
    rb"_ZZ[\w.$]*?E(?:14is_initializedEbE(11initialized)|(8tbAssign))(?:_\d|__\d+_)?(?=\0)"
)
_FLAG, _POINTER = 1, 8  # bytes

_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)
_files: dict[Path, Banks | None] = {}

Call = Callable[[Any, Any, int, Any], int]


class Banks:
    """A file's variables, and what they are on each device but the one they were last used on.

    One call at a time, which holds the lock to its end: a launcher reads them throughout.
    Reentrant for signal handlers that launch.
    """

    def __init__(self, variables: list[memoryview]) -> None:
        self._variables = variables
        self._device: int | None = None
        self._kept: dict[int, list[bytes]] = {}
        self._lock = threading.RLock()

    def switch(self, device: int) -> None:
        """Let the variables be a device's; on its first use they are as in a new process."""
        if device == self._device:
            return
        if self._device is not None:
            self._kept[self._device] = [bytes(variable) for variable in self._variables]
            values = self._kept.get(device) or [bytes(len(v)) for v in self._variables]
            for variable, value in zip(self._variables, values, strict=True):
                variable[:] = value
        self._device = device

    def guard(self, call: Call) -> Call:
        """A function of the file, on the device that is current when it is called."""

        def guarded(handle: Any, args: Any, count: int, result: Any) -> int:
            with self._lock:
                self.switch(_current_device())
                return call(handle, args, count, result)

        return guarded


def _current_device() -> int:
    runtime, current = machine.load_cudart()[0], ffi.new("int *")
    code = runtime.cudaGetDevice(current)
    if code:
        raise cuda_errors.failed(runtime, code, "cudaGetDevice")
    return int(current[0])


def guarded(path: Path, handle: Any, call: Call) -> Call:
    """A function of a kernel file that may be called on several GPUs in turns."""
    if not _MODULES.fullmatch(path.stem) or machine.device_count() < 2:
        return call
    with _lock:
        if path not in _files:
            found = variables(path, handle)
            _files[path] = Banks(found) if found else None
        banks = _files[path]
    return call if banks is None else banks.guard(call)


def variables(path: Path, handle: Any) -> list[memoryview]:
    """The variables of a loaded file that hold for one GPU; all are zero when it is loaded."""
    with open_section(path, ".dynstr") as names:
        table = b"" if names is None else names.at(0, names.size)
    found = []
    for match in _VARIABLE.finditer(table):
        address = library.find_symbol(handle, match[0].decode())
        if address is not None:
            size = _FLAG if match[1] else _POINTER
            found.append(memoryview(ffi.buffer(address, size)).cast("B"))
    return found
