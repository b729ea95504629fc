"""The one gate every failed call goes through, in both directions; CUDA's errors by number.

The numbers are the runtime's and the driver's alike (driver_types.h, cuda.h).
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, TracebackType
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import TypeIndex
from fi_ffi.errors import DeviceError, KernelError

_MAX_CAUSES = 16
_MOST_WORDS = 64 << 20  # bytes of an error's message or backtrace; more is no text
_MOST_FRAMES = 64  # of Python, told of a callback's exception
_MOST_BACKTRACE = 1 << 16  # characters of a kernel's that goes up through a callback

# The class's own name, whatever its metaclass makes of `__name__`, and the cause, whatever a
# subclass makes of it.
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
_cause: Any = BaseException.__dict__["__cause__"]


def check(code: int, op: str) -> None:
    """Raise what a TVM-FFI call left behind, if `code` says that it failed."""
    if code:
        raise take_raised(op)


# Looks for what is behind a kernel's error; there once the process has a CUDA runtime.
examine: Callable[[KernelError], KernelError] | None = None


def check_kernel(code: int, op: str) -> None:
    """`check` for a call that may have been a kernel's: its GPU may be lost (`DeviceError`)."""
    if code:
        raise take_kernel_error(op)


def take_kernel_error(op: str) -> BaseException:
    """`take_raised`, examined."""
    error = take_raised(op)
    if examine is None or not isinstance(error, KernelError):
        return error
    return examine(error)


# Exceptions of callbacks that are no kernel's failure (Ctrl-C, an exit, an exception of a
# signal handler), by the address of the Error object that travels in their place.  The reference
# to that object keeps the address from being another's.
_travelling: dict[int, tuple[Any, BaseException]] = {}
# The exceptions of these kinds are made anew where the original is gone.
_REBUILT: dict[str, type[BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
}


def take_raised(op: str) -> BaseException:
    """The error raised on this thread, as an exception; its object is released here.

    It is a `KernelError`, or, where a callback raised what is no failure of a kernel's, that
    exception itself, with the `KernelError` as its cause.
    """
    slot = ffi.new("TVMFFIObjectHandle *")
    library.lib.TVMFFIErrorMoveFromRaised(slot)
    if slot[0] == ffi.NULL:
        return KernelError(op, "UnknownError", "the call failed and left no error behind")
    _, original = _travelling.pop(library.address_of(slot[0]), (None, None))
    try:
        error = error_from(slot[0], op)
    finally:
        library.lib.TVMFFIObjectDecRef(slot[0])
    if original is None:
        if error.kind not in _REBUILT:
            return error
        original = _rebuilt(error.kind, error.message)
    before = _cause.__get__(original)
    if isinstance(before, KernelError):  # of a deeper call that the exception went through
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
    """An Error object's words as an exception, with its causes chained; borrows `handle`."""
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
    """Whether an Error has a cause that can be read.

    An error is laid out by whoever made it.  Up to 0.1.7 TVM-FFI's headers had no
    cause after the backtrace, and a kernel compiled with them puts something else
    there.  Only what libtvm_ffi itself made is known to have one; its deleter tells.
    """
    made = ffi.cast("FiFfiErrorObject *", handle)
    if not library.is_of_libtvm_ffi(made.header.deleter):
        return False
    return bool(made.cell.cause_chain != ffi.NULL)


def _words(part: Any) -> str:
    if part.size > _MOST_WORDS:
        return f"({part.size} bytes, which are not read)"
    return library.read_bytes(part).decode("utf-8", errors="replace")


def message_of(error: BaseException) -> str:
    """An exception's message; its own `__str__` may raise anything."""
    try:
        return str(error)
    except BaseException as broken:
        return f"(its message cannot be told: {_name_of(type(broken))})"


def set_raised(error: BaseException) -> None:
    """Leave a Python exception behind as this thread's TVM-FFI error.

    Always an error: a caller in C++ takes it as there, and would read a null pointer.
    """
    try:
        _raise(error)
    except Exception:
        _raise_fallback(type(error))
    except BaseException as interrupt:  # Ctrl-C, while the error was told
        try:
            _raise(interrupt)
        except BaseException:
            _raise_fallback(type(interrupt))


def set_escaped(
    kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    """`set_raised` for an exception that left the callback uncaught, as cffi reports it."""
    try:
        set_raised(BaseException.with_traceback(error, frames))
    except BaseException:  # no stack is left for more
        _raise_fallback(kind)


def _raise_fallback(kind: type[BaseException]) -> None:
    """Leave behind an error made in advance: memory or stack may not suffice for a new one."""
    for known, handle in _fallbacks:
        if issubclass(kind, known):
            library.lib.TVMFFIErrorSetRaised(handle)
            return


def prepare_fallbacks() -> None:
    """Make the errors of `_raise_fallback`, once; they live as long as the process."""
    if not _fallbacks:
        words = b"a callback failed, and what it raised cannot be told"
        kinds = {**_REBUILT, "RuntimeError": BaseException}
        # All at once: another thread may look.
        _fallbacks.extend(
            [(kind, _create_error(name.encode(), words, b"")) for name, kind in kinds.items()]
        )


_fallbacks: list[tuple[type[BaseException], Any]] = []


def _raise(error: BaseException) -> None:
    made = ffi.gc(_create_error(*_error_parts(error)), library.lib.TVMFFIObjectDecRef)
    # An Error that nobody else refers to was swallowed on its way: its exception goes nowhere.
    for address, (handle, _) in _travelling.copy().items():
        if library.references(handle) == 1:
            _travelling.pop(address, None)
    if not isinstance(error, Exception) or _is_of_signal_handler(error):
        _travelling[library.address_of(made)] = made, error
    library.lib.TVMFFIErrorSetRaised(made)


def _is_of_signal_handler(error: BaseException) -> bool:
    """Whether an exception came out of a signal handler that ran in between."""
    if threading.get_ident() != threading.main_thread().ident:
        return False  # Python runs handlers on the main thread alone
    handlers = {*_handler_codes()}
    frames = error.__traceback__
    while handlers and frames is not None:
        if frames.tb_frame.f_code in handlers:
            return True
        frames = frames.tb_next
    return False


def _handler_codes() -> Iterator[CodeType]:
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            function = getattr(handler, "func", handler)  # of a functools.partial
            for made in (function, type(function).__call__):
                if isinstance(code := getattr(made, "__code__", None), CodeType):
                    yield code


def _error_parts(error: BaseException) -> tuple[bytes, ...]:
    """Kind, message and backtrace."""
    frames = "".join(reversed(traceback.format_tb(error.__traceback__, -_MOST_FRAMES)))
    message = message_of(error)
    if type(error) is KernelError:
        # Its backtrace apart: one that goes up through callbacks would grow in each.
        message = f"{error.op}: {error.kind}: {error.message}"
        frames = f"{error.backtrace}\n{frames}"[:_MOST_BACKTRACE]
    # str's own encode: the text may be of a class of the caller's.
    parts = (_name_of(type(error)), message, frames)
    return tuple(str.encode(part, "utf-8", "replace") for part in parts)


def _create_error(*parts: bytes) -> Any:
    arrays = [library.byte_array(part) for part in parts]
    slot = ffi.new("TVMFFIObjectHandle *")
    if library.lib.TVMFFIErrorCreate(arrays[0][0], arrays[1][0], arrays[2][0], slot):
        raise MemoryError("an Error object")
    return slot[0]


# Of which CUDA says that further work returns the same error, until the process ends.
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

# What a thread may have been left with by another call, and no launch ends in.
LEFTOVERS = {
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

_WHAT_TO_DO = (
    "Work that was queued earlier, by this or any other call of this process, failed on the GPU; "
    "{op} only noticed. The process has lost its CUDA context: every later call fails alike, what "
    "is in GPU memory cannot be trusted, and only a new process can go on. To find the call at "
    "fault: run it with CUDA_LAUNCH_BLOCKING=1, in fi_ffi.call_log(5, ...), or under "
    "compute-sanitizer"
)


def lost(op: str, code: int, words: str = "") -> DeviceError:
    """The error of a GPU that is lost to this process, for a code of `STICKY`."""
    told = f"CUDA error {code} ({words or STICKY[code]})"
    return DeviceError(op, STICKY[code], f"{told}. {_WHAT_TO_DO.format(op=op)}", code)
