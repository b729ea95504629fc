"""What a refusal must be, and what keeps the CPU's reference kernels from memory that is not there.

An address cannot be held against how much memory lies behind it: a call that fits its row may be
of memory that nobody has.  Such a call ends here, before a kernel looks at anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import fi_ffi
from fi_ffi import errors
from fi_ffi.reference import arrays

_as_array = arrays.as_array
_WORDS = "a call that fits, of memory that is not there"


class Guard:
    """While `is_open`, kernels run."""

    is_open = True

    def __call__(self, desc: Any) -> Any:
        if not self.is_open:
            raise RuntimeError(_WORDS)
        return _as_array(desc)


guard = Guard()


def stopped(error: BaseException) -> bool:
    """Whether a call went as far as its kernel, and no further."""
    return isinstance(error, errors.KernelError) and _WORDS in error.message


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    arrays.as_array = guard
    try:
        yield
    finally:
        arrays.as_array = _as_array


@contextlib.contextmanager
def kernels_run(can: bool) -> Iterator[None]:
    guard.is_open = can
    try:
        yield
    finally:
        guard.is_open = True


def check_refusal(
    error: BaseException, ops: Collection[str], arguments: Collection[str] | None
) -> None:
    """A typed error that names the op and one of its arguments, in its fields and in its text."""
    assert isinstance(error, fi_ffi.ArgumentError), (
        f"{type(error).__name__} from the inside: {error}"
    )
    text = str(error)
    assert error.op in ops, f"of {error.op}, not of {ops}: {text}"
    assert text.startswith(f"{error.op}: argument `{error.argument}`: got "), text
    assert str(error.expected), text
    assert text.endswith(f", expected {error.expected}"), text
    assert not text.startswith(f"{error.op}: argument `{error.argument}`: got , "), text
    assert len(text) < 2000, f"{len(text)} letters: {text[:300]}"
    assert arguments is None or error.argument in arguments, text
