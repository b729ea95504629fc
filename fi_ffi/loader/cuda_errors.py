"""What is done when a call of CUDA has failed, or a kernel: asked of the runtime only then.

The runtime keeps each thread's last error until somebody asks for it, and a kernel's launcher
that asks after its launch takes an older one for its own.  So whatever fails here is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import failure
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import LEFTOVERS, STICKY, lost
from fi_ffi.abi.function import PROBE_ARGUMENTS
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.errors import DeviceError, KernelError

# Entries whose launchers end the process where an error is left, whoever left it.
_ABORTING = ("fused_qk_rmsnorm_rope",)

RELAXED = 2  # cudaStreamCaptureModeRelaxed


def forget(runtime: Any) -> int:
    """The thread's last error, which is no more; a sticky one stays in its context."""
    code = int(runtime.cudaGetLastError())
    # cuda-python may have a runtime of its own, with errors of its own.
    theirs = sys.modules.get("cuda.bindings.runtime")
    if theirs is not None:
        theirs.cudaGetLastError()
    return code


def words_of(runtime: Any, code: int) -> str:
    """CUDA's words for an error: its text, or its name."""
    text = runtime.cudaGetErrorString(code)
    return STICKY.get(code, "") if text == ffi.NULL else ffi.string(text).decode(errors="replace")


def failed(runtime: Any, code: int, what: str) -> KernelError:
    """The error of a CUDA call that returned `code`; it is not left for others to find."""
    forget(runtime)
    if code in STICKY:
        return lost(what, code, words_of(runtime, code))
    return KernelError(what, "RuntimeError", f"CUDA error {code} ({words_of(runtime, code)})")


def check_lost(runtime: Any, code: int, what: str) -> None:
    """Forget a call's failure that its caller can do without, unless the GPU is lost."""
    if code:
        forget(runtime)
        if code in STICKY:
            raise lost(what, code, words_of(runtime, code))


def examine(runtime: Any, error: KernelError, has_context: bool) -> KernelError:
    """A kernel's error, or what is behind it: a GPU that is lost, an error that was there before.

    `has_context` is whether the thread has used a GPU: none is started by asking.
    """
    if isinstance(error, DeviceError):
        return error
    code = forget(runtime)
    if code not in STICKY:
        code = _asked(runtime) if has_context else 0
    if code in STICKY:
        found = lost(error.op, code, words_of(runtime, code))
        found.__cause__ = error
        return found
    for left, name in LEFTOVERS.items():
        if any(words and words in error.message for words in (name, words_of(runtime, left))):
            told = (
                f"{error.message} ({name} is not an error of a launch: another CUDA call of this "
                "thread failed before and left it to be found. It is forgotten now; the kernel "
                "itself may well have run)"
            )
            return KernelError(error.op, error.kind, told, error.backtrace)
    return error


def _asked(runtime: Any) -> int:
    """The error that the current device's context is in; 0 where it is in none."""
    mode, status = ffi.new("int *", RELAXED), ffi.new("int *")
    stream = ffi.cast("void *", PER_THREAD)  # which no capture of another forbids
    runtime.cudaThreadExchangeStreamCaptureMode(mode)
    try:
        code = int(runtime.cudaStreamIsCapturing(stream, status))
        if code == 0 and status[0] == 0:
            code = int(runtime.cudaStreamQuery(stream))
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(mode)
    if code:
        forget(runtime)
    return code


def spared(symbol: str, call: Callable[..., int], load: Callable[[], Any]) -> Callable[..., int]:
    """A function that is not called where it would end the process; `load` gives the runtime.

    What was left is forgotten, so that the call can be made again.
    """
    if symbol not in _ABORTING:
        return call

    def careful(handle: Any, args: Any, count: int, result: Any) -> int:
        code = forget(load()) if count < PROBE_ARGUMENTS else 0
        if code:
            told = (
                f"CUDA error {code} was left on this thread by an earlier call; the launcher would "
                "end the process over it, and was not called. It is forgotten now"
            )
            failure.set_raised(RuntimeError(told))
            return -1
        return call(handle, args, count, result)

    return careful
