"""The one gate every failed call goes through, in both directions."""

from __future__ import annotations

import traceback
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import KernelError

_MAX_CAUSES = 16


def check(code: int, op: str) -> None:
    """Raise what a TVM-FFI call left behind, if `code` says that it failed."""
    if code:
        raise take_raised(op)


def take_raised(op: str) -> KernelError:
    """The error raised on this thread, as an exception; its object is released here."""
    slot = ffi.new("TVMFFIObjectHandle *")
    library.lib.TVMFFIErrorMoveFromRaised(slot)
    if slot[0] == ffi.NULL:
        return KernelError(op, "UnknownError", "the call failed and left no error behind")
    try:
        return error_from(slot[0], op)
    finally:
        library.lib.TVMFFIObjectDecRef(slot[0])


def error_from(handle: Any, op: str, depth: int = 0) -> KernelError:
    """An Error object's words as an exception, with its causes chained; borrows `handle`."""
    cell = ffi.cast("FiFfiErrorObject *", handle).cell
    kind, message, backtrace = (
        library.read_bytes(part).decode("utf-8", errors="replace")
        for part in (cell.kind, cell.message, cell.backtrace)
    )
    error = KernelError(op, kind, message, backtrace)
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


def message_of(error: BaseException) -> str:
    """An exception's message; its own `__str__` may raise."""
    try:
        return str(error)
    except Exception as broken:
        return f"(its message cannot be told: {type(broken).__name__})"


def set_raised(error: BaseException) -> None:
    """Leave a Python exception behind as this thread's TVM-FFI error."""
    frames = "".join(reversed(traceback.format_tb(error.__traceback__)))
    parts = (type(error).__name__, message_of(error), frames)
    arrays = [library.byte_array(part.encode("utf-8", errors="replace")) for part in parts]
    slot = ffi.new("TVMFFIObjectHandle *")
    if library.lib.TVMFFIErrorCreate(arrays[0][0], arrays[1][0], arrays[2][0], slot) == 0:
        library.lib.TVMFFIErrorSetRaised(slot[0])
        library.lib.TVMFFIObjectDecRef(slot[0])
