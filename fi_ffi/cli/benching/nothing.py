"""A kernel entry that does nothing: put behind a call, what is left is the host's part of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.frame import Frame
from fi_ffi.abi.function import Entry
from fi_ffi.abi.values import unpack
from fi_ffi.errors import LoaderError
from fi_ffi.ops.attention import BatchDecodePlan
from fi_ffi.ops.attention.run import Values
from fi_ffi.ops.form import Form
from fi_ffi.ops.op import Op
from fi_ffi.ops.row import Row
from fi_ffi.ops.settled import Settled

# Returns 0 and looks at nothing, as attributes of a mutex have nothing to be freed: in a
# kernel's place it ignores the handle, the arguments and the result that it is given.
_SYMBOL = "pthread_mutexattr_destroy"


def nothing() -> Entry:
    """The entry that does nothing."""
    address = library.find_symbol(ffi.NULL, _SYMBOL)
    if address is None:
        raise LoaderError(f"this process has no {_SYMBOL}, which stands for a kernel here")
    return Entry("nothing", address)


def put_behind(op: Op, *values: object) -> Settled:
    """Let the op's calls with tensors laid out like these end in the entry that does nothing.

    That a kernel is looked up when its first call is made is all that this takes away.
    """
    settled, _ = op._form.check([*values], None)
    settled.start(nothing(), op.row.name)
    return settled


def next_frame(settled: Settled) -> Frame:
    """The frame that the next call or prepared call takes."""
    frame = settled.frame()
    settled.frames.append(frame)
    return frame


class IdlePlan(BatchDecodePlan):
    """A plan that runs like any other, and once it `is_idle` the entry that does nothing."""

    is_idle = False
    # Of the last run that was packed anew.
    row: Row
    settled: Settled
    frame: Frame

    def launch(
        self, form: Form, values: Values, stream: object, names: Sequence[str],
        options: tuple[object, ...], tensors: Sequence[Any],
    ) -> Any:  # fmt: skip
        if self.is_idle:
            # Of its own: plans that are alike share theirs.
            form = Form(form.row, form.module, form.known)
            self.row = form.row
            self.settled, _ = form.check(values.values.copy(), None)
            self.settled.start(nothing(), self.op)
            self.frame = next_frame(self.settled)
        return super().launch(form, values, stream, names, options, tensors)


class Given(NamedTuple):
    """What one call gave its entry, and the stream that was current."""

    arguments: list[Any]
    stream: int


@contextmanager
def noted(settled: Settled, frame: Frame) -> Iterator[list[Given]]:
    """What each call inside the block gives the entry, read back from C.

    `frame` is the one that is called, the quick way or the full one.
    """
    entry, device = settled.entry, settled.device
    assert entry is not None
    invoke: Any = frame.invoke
    address: Any = entry.address
    calls: list[Given] = []

    def noting(handle: Any, packed: Any, count: int, result: Any) -> int:
        stream = library.lib.TVMFFIEnvGetStream(device.type_code, device.index)
        arguments = [unpack(packed[i], owned=False) for i in range(count)]
        calls.append(Given(arguments, int(ffi.cast("uintptr_t", stream))))
        code: int = address(handle, packed, count, result)
        return code

    frame.invoke, entry.address = functools.partial(noting, *invoke.args), noting
    try:
        yield calls
    finally:
        frame.invoke, entry.address = invoke, address
