"""Examination of failed CUDA calls and kernels; the runtime is queried only after a failure.

The runtime keeps each thread's last error until it is read. A launcher that checks for errors after
its launch takes an older error for its own. Therefore every failure is cleared here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import failure
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import STICKY, lost
from fi_ffi.abi.function import PROBE_ARGUMENTS
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.errors import DeviceError, KernelError

# Entries whose launchers end the process if any earlier error is pending.
_ABORTING = ("fused_qk_rmsnorm_rope",)

RELAXED = 2  # cudaStreamCaptureModeRelaxed

# Codes that an earlier call may have left on the thread and that no launch returns.
_LEFTOVERS = {
    3: "cudaErrorInitializationError",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    101: "cudaErrorInvalidDevice",
    600: "cudaErrorNotReady",
    704: "cudaErrorPeerAccessAlreadyEnabled",
    705: "cudaErrorPeerAccessNotEnabled",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    910: "cudaErrorGraphExecUpdateFailure",
}


def forget(runtime: Any) -> int:
    """Clear and return the thread's last error; a sticky error stays in its context."""
    code = int(runtime.cudaGetLastError())
    # cuda-python may use another copy of the runtime, with its own last error.
    theirs = sys.modules.get("cuda.bindings.runtime")
    if theirs is not None:
        theirs.cudaGetLastError()
    return code


def words_of(runtime: Any, code: int) -> str:
    """Return CUDA's text for an error, or its name."""
    text = runtime.cudaGetErrorString(code)
    return STICKY.get(code, "") if text == ffi.NULL else ffi.string(text).decode(errors="replace")


def failed(runtime: Any, code: int, what: str) -> KernelError:
    """Clear the error of a CUDA call that returned `code`, and return it as an exception."""
    forget(runtime)
    if code in STICKY:
        return lost(what, code, words_of(runtime, code))
    return KernelError(what, "RuntimeError", f"CUDA error {code} ({words_of(runtime, code)})")


def check_lost(runtime: Any, code: int, what: str) -> None:
    """Clear an error that the caller can ignore; raise if the GPU is lost."""
    if code:
        forget(runtime)
        if code in STICKY:
            raise lost(what, code, words_of(runtime, code))


def examine(runtime: Any, error: KernelError, has_context: bool) -> KernelError:
    """Return a kernel's error, or its real cause: a lost GPU, or an error pending before the call.

    `has_context` says whether the thread has used a GPU; the check does not create a context.
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
    for left, name in _LEFTOVERS.items():
        if any(words and words in error.message for words in (name, words_of(runtime, left))):
            message = (
                f"{error.message} ({name} is not an error of a launch: another CUDA call of this "
                "thread failed before and left it to be found. It is forgotten now; the kernel "
                "itself may well have run)"
            )
            return KernelError(error.op, error.kind, message, error.backtrace)
    return error


def _asked(runtime: Any) -> int:
    """Return the sticky error of the current device's context, or 0."""
    mode, status = ffi.new("int *", RELAXED), ffi.new("int *")
    stream = ffi.cast("void *", PER_THREAD)  # works during another stream's capture
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


def guard_abort(
    symbol: str, call: Callable[..., int], load: Callable[[], Any]
) -> Callable[..., int]:
    """Guard a function whose launcher would end the process; `load` returns the runtime.

    The pending error is cleared, so that the call can be repeated.
    """
    if symbol not in _ABORTING:
        return call

    def guarded(handle: Any, args: Any, count: int, result: Any) -> int:
        code = forget(load()) if count < PROBE_ARGUMENTS else 0
        if code:
            message = (
                f"CUDA error {code} was left on this thread by an earlier call; the launcher would "
                "end the process over it, and was not called. It is forgotten now"
            )
            failure.set_raised(RuntimeError(message))
            return -1
        return call(handle, args, count, result)

    return guarded
