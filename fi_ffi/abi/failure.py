"""The one gate every failed call goes through, in both directions."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import library, types
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import KernelError

_MAX_CAUSES = 16
_MOST_WORDS = 64 << 20  # bytes of an error's message or backtrace; more is no text
_MOST_FRAMES = 64  # of Python, told of a callback's exception
_MOST_BACKTRACE = 1 << 16  # characters of a kernel's that goes up through a callback

# The class's own name, whatever its metaclass makes of `__name__`.
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__


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


def take_kernel_error(op: str) -> KernelError | KeyboardInterrupt:
    """`take_raised`, examined."""
    error = take_raised(op)
    if examine is None or isinstance(error, KeyboardInterrupt):
        return error
    return examine(error)


def take_raised(op: str) -> KernelError | KeyboardInterrupt:
    """The error raised on this thread, as an exception; its object is released here.

    A Ctrl-C that met a function in Python comes out as what it is.
    """
    slot = ffi.new("TVMFFIObjectHandle *")
    library.lib.TVMFFIErrorMoveFromRaised(slot)
    if slot[0] == ffi.NULL:
        return KernelError(op, "UnknownError", "the call failed and left no error behind")
    try:
        error = error_from(slot[0], op)
    finally:
        library.lib.TVMFFIObjectDecRef(slot[0])
    if error.kind != KeyboardInterrupt.__name__:
        return error
    interrupt = KeyboardInterrupt(*filter(None, [error.message]))
    interrupt.__cause__ = error
    return interrupt


def error_from(handle: Any, op: str, depth: int = 0) -> KernelError:
    """An Error object's words as an exception, with its causes chained; borrows `handle`."""
    made = ffi.cast("FiFfiErrorObject *", handle)
    if made.header.type_index != types.ERROR:
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
        _raise(*_parts_of(error))
    except BaseException as broken:
        raise_untold(type(error if isinstance(error, KeyboardInterrupt) else broken))


def raise_untold(kind: type[BaseException], *_: object) -> None:
    """Leave behind an error that was made before, where no memory or stack is left for another."""
    library.lib.TVMFFIErrorSetRaised(_UNTOLD[issubclass(kind, KeyboardInterrupt)])


def prepare_untold() -> None:
    """Make what `raise_untold` leaves behind, once; it stays for the life of the process."""
    if not _UNTOLD:
        words = b"a callback failed, and what it raised cannot be told"
        _UNTOLD.extend(
            _created(kind, words, b"") for kind in (b"RuntimeError", b"KeyboardInterrupt")
        )


# For an exception of any kind, and for Ctrl-C.
_UNTOLD: list[Any] = []


def _parts_of(error: BaseException) -> tuple[bytes, ...]:
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


def _created(*parts: bytes) -> Any:
    arrays = [library.byte_array(part) for part in parts]
    slot = ffi.new("TVMFFIObjectHandle *")
    if library.lib.TVMFFIErrorCreate(arrays[0][0], arrays[1][0], arrays[2][0], slot):
        raise MemoryError("an Error object")
    return slot[0]


def _raise(*parts: bytes) -> None:
    made = _created(*parts)
    library.lib.TVMFFIErrorSetRaised(made)
    library.lib.TVMFFIObjectDecRef(made)
