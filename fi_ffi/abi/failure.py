"""Conversion of errors between TVM-FFI and Python, in both directions, and CUDA error codes.

The CUDA runtime and the driver use the same numbers (driver_types.h, cuda.h).
"""

from __future__ import annotations

import functools
import operator
import signal
import threading
import traceback
import weakref
from _thread import interrupt_main
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import TypeIndex
from fi_ffi.errors import ArgumentError, DeviceError, KernelError, signal_of

_MAX_CAUSES = 16
_MAX_WORDS = 64 << 20  # bytes of an error's message or backtrace; a longer one is corrupt
_MAX_FRAMES = 64  # Python frames reported for a callback's exception
_MAX_BACKTRACE = 1 << 16  # characters of a kernel's backtrace passed on through a callback

# Read the class name and the cause through the base types: a metaclass or a subclass may override
# both attributes.
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
_cause: Any = BaseException.__dict__["__cause__"]


def check(code: int, op: str) -> None:
    """Raise the pending TVM-FFI error if `code` reports a failure."""
    if code:
        raise take_raised(op)


# Looks for the cause of a kernel's error. Set once the process has a CUDA runtime.
examine: Callable[[KernelError], KernelError] | None = None


def check_kernel(code: int, op: str) -> None:
    """Do what `check` does for a call that may run a kernel; a lost GPU raises `DeviceError`."""
    if code:
        raise take_kernel_error(op)


def take_kernel_error(op: str) -> BaseException:
    """Return the error of `take_raised`, replaced by a `DeviceError` if the GPU is lost."""
    error = take_raised(op)
    if examine is None or not isinstance(error, KernelError):
        return error
    return examine(error)


# Callback exceptions that are no kernel failure (Ctrl-C, an exit, an exception of a signal
# handler), keyed by the address of the Error object that stands for them. Holding a reference to
# the Error object keeps its address from being reused.
_travelling: dict[int, tuple[Any, BaseException]] = {}
# The last of them of each thread for which no Error object of its own could be made.
_escaped: dict[int, BaseException] = {}
# Exception types that are rebuilt if the original exception is gone.
_REBUILT: dict[str, type[BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
}


def take_raised(op: str) -> BaseException:
    """Return this thread's pending error as an exception and release its Error object.

    The result is a `KernelError`. If a callback raised an exception that is no kernel failure, the
    result is that exception, with the `KernelError` as its cause.
    """
    slot = ffi.new("TVMFFIObjectHandle *")
    library.lib.TVMFFIErrorMoveFromRaised(slot)
    if slot[0] == ffi.NULL:
        return KernelError(op, "UnknownError", "the call failed and left no error behind")
    handle = ffi.gc(slot[0], library.lib.TVMFFIObjectDecRef)
    _, original = _travelling.pop(library.address_of(handle), (None, None))
    error = error_from(handle, op)
    escaped = _escaped.pop(threading.get_ident(), None)
    if escaped is not None and error.kind in (_ESCAPED, _name_of(type(escaped))):
        original = escaped
    if original is None:
        if error.kind not in _REBUILT:
            return error
        original = _rebuilt(error.kind, error.message)
    if _is_of_kernel(original):
        original.is_of_kernel = False  # type: ignore[attr-defined]
        return original.with_traceback(None)  # whose frames have arrays of the call's memory
    before = _cause.__get__(original)
    if isinstance(before, KernelError):  # set by a deeper call that the exception passed through
        before = _cause.__get__(before)
    if before is not None:
        error.__cause__ = before
    _cause.__set__(original, error)
    return original


def _rebuilt(kind: str, message: str) -> BaseException:
    if kind == SystemExit.__name__ and message.isdecimal():
        return SystemExit(int(message))
    return _REBUILT[kind](*filter(None, [message]))


def error_from(handle: Any, op: str, depth: int = 0) -> KernelError:
    """Convert an Error object and its chain of causes to an exception; borrows `handle`."""
    made = ffi.cast("FiFfiErrorObject *", handle)
    if made.header.type_index != TypeIndex.ERROR:
        message = f"the call failed and left an object of type index {made.header.type_index}"
        return KernelError(op, "UnknownError", f"{message}, which is no error")
    cell = made.cell
    words = (_words(part) for part in (cell.kind, cell.message, cell.backtrace))
    error = KernelError(op, *words)
    if depth < _MAX_CAUSES and _has_cause(handle):
        error.__cause__ = error_from(cell.cause_chain, op, depth + 1)
    return error


def _has_cause(handle: Any) -> bool:
    """Return whether an Error has a cause that is safe to read.

    Whoever creates an Error decides its layout. Headers of TVM-FFI up to 0.1.7 have no cause after
    the backtrace, so a kernel compiled with them has other data there. Only Errors created by
    libtvm_ffi itself are known to have the field; the address of their deleter identifies them.
    """
    made = ffi.cast("FiFfiErrorObject *", handle)
    if not library.is_of_libtvm_ffi(made.header.deleter):
        return False
    return bool(made.cell.cause_chain != ffi.NULL)


def _words(part: Any) -> str:
    if part.size > _MAX_WORDS:
        return f"({part.size} bytes, which are not read)"
    return library.read_bytes(part).decode("utf-8", errors="replace")


def message_of(error: BaseException) -> str:
    """Return an exception's message, even if the exception's `__str__` raises."""
    try:
        return str(error)
    except BaseException as broken:
        return f"(its message cannot be read: {_name_of(type(broken))})"


def set_raised(error: BaseException) -> None:
    """Set a Python exception as this thread's TVM-FFI error.

    An error is set in every case: the C++ caller expects one and would read a null pointer.
    """
    try:
        _raise(error)
    except BaseException as broken:
        if not is_foreign(broken):
            _raise_fallback(error, not is_foreign(error))
            return
        try:  # Ctrl-C while the error was converted
            _raise(broken)
        except BaseException:
            _raise_fallback(broken, False)


def set_escaped(
    kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    """Do what `set_raised` does for an exception that cffi caught outside the callback."""
    try:
        set_raised(BaseException.with_traceback(error, frames))
    except BaseException:  # the stack is exhausted
        _raise_fallback(error, issubclass(kind, Exception))


def _raise_fallback(error: BaseException, is_failure: bool) -> None:
    """Set an error created in advance: memory or stack may not suffice for a new one."""
    if not is_failure:
        _escaped[threading.get_ident()] = error
    library.lib.TVMFFIErrorSetRaised(_fallbacks[is_failure])


def is_foreign(error: BaseException) -> bool:
    """Return whether an exception is no failure of the code that it passed through."""
    return not isinstance(error, Exception) or signal_of(error) != 0


class _Again(weakref.ref[Any]):
    __slots__ = ("raise_",)
    raise_: Callable[[], None]


def signal_again(error: BaseException) -> object | None:
    """Return an object whose end raises the signal again of whose handler the exception is, or None
    if it is none's.

    A destructor returns to Python with it as its last local variable: no line of Python comes after
    its end in which the exception could be lost once more.
    """
    number = signal_of(error) or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
    if not number:
        return None
    alive = ffi.new("char *")
    again = _Again(alive, operator.methodcaller("raise_"))
    again.raise_ = functools.partial(interrupt_main, signal.Signals(number))
    return again, alive  # a tuple drops its last item first


def prepare_fallbacks() -> None:
    """Create the errors of `_raise_fallback` once, for the life of the process."""
    if not _fallbacks:
        words = b"a callback failed, and its exception cannot be converted"
        kinds = (_ESCAPED, "RuntimeError")
        # Extend once: another thread may read.
        _fallbacks.extend([_create_error(name.encode(), words, b"") for name in kinds])


_ESCAPED = "BaseException"  # the kind of the Error that stands for a thread's `_escaped`
_fallbacks: list[Any] = []


def _raise(error: BaseException) -> None:
    made = ffi.gc(_create_error(*_error_parts(error)), library.lib.TVMFFIObjectDecRef)
    # Drop exceptions whose Error has no other reference: the error was swallowed on its way.
    for address, (handle, _) in _travelling.copy().items():
        if library.references(handle) == 1:
            _travelling.pop(address, None)
    if is_foreign(error) or _is_of_kernel(error):
        _travelling[library.address_of(made)] = made, error
    library.lib.TVMFFIErrorSetRaised(made)


def _is_of_kernel(error: BaseException) -> bool:
    return isinstance(error, ArgumentError) and error.is_of_kernel


def _error_parts(error: BaseException) -> tuple[bytes, ...]:
    """Return an exception's kind, message and backtrace."""
    frames = "".join(reversed(traceback.format_tb(error.__traceback__, -_MAX_FRAMES)))
    message = message_of(error)
    if type(error) is KernelError:
        # Keep the kernel's backtrace out of the message, which would grow with each callback it
        # passes.
        message = f"{error.op}: {error.kind}: {error.message}"
        frames = f"{error.backtrace}\n{frames}"[:_MAX_BACKTRACE]
    # Call str's own encode: the text may be of a subclass that overrides it.
    parts = (_name_of(type(error)), message, frames)
    return tuple(str.encode(part, "utf-8", "replace") for part in parts)


def _create_error(*parts: bytes) -> Any:
    arrays = [library.byte_array(part) for part in parts]
    slot = ffi.new("TVMFFIObjectHandle *")
    if library.lib.TVMFFIErrorCreate(arrays[0][0], arrays[1][0], arrays[2][0], slot):
        raise MemoryError("an Error object")
    return slot[0]


# Codes after which CUDA returns the same error for all further work of the process.
STICKY = {
    214: "cudaErrorECCUncorrectable",
    220: "cudaErrorNvlinkUncorrectable",
    226: "cudaErrorContained",
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    709: "cudaErrorContextIsDestroyed",
    710: "cudaErrorAssert",
    714: "cudaErrorHardwareStackError",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    718: "cudaErrorInvalidPc",
    719: "cudaErrorLaunchFailure",
    721: "cudaErrorTensorMemoryLeak",
    911: "cudaErrorExternalDevice",
}

_WHAT_TO_DO = (
    "Work that was queued earlier, by this or any other call of this process, failed on the GPU; "
    "{op} only noticed. The process has lost its CUDA context: every later call fails alike, what "
    "is in GPU memory cannot be trusted, and only a new process can go on. To find the call at "
    "fault: run it with CUDA_LAUNCH_BLOCKING=1, in fi_ffi.call_log(5, ...), or under "
    "compute-sanitizer"
)


def lost(op: str, code: int, words: str = "") -> DeviceError:
    """Return the error for a GPU lost to this process, for a code of `STICKY`."""
    text = f"CUDA error {code} ({words or STICKY[code]})"
    return DeviceError(op, STICKY[code], f"{text}. {_WHAT_TO_DO.format(op=op)}", code)
