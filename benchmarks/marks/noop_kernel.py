"""A kernel that does nothing in the place of every kernel, and one that notes its arguments.

All that the command uses of the library's inside is used here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fi_ffi import TensorDesc, reference
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, global_function, register
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import LoaderError
from fi_ffi.loader import generation, machine, runtime, search
from fi_ffi.loader.fetch.wheels_lock import the_lock

# Returns 0 and looks at nothing, as attributes of a mutex have nothing to be freed: in a
# kernel's place it ignores the handle, the arguments and the result that it is given.
_SYMBOL = "pthread_mutexattr_destroy"
# Returns an array of whatever it is given, as a planner returns one.
_PLANNER = "ffi.Array"


def noop(signature: Signature | None = None) -> Entry:
    """The entry that does nothing; of a planner, one in C that returns an array."""
    if signature is not None and signature.result != "void":
        return global_function(_PLANNER)
    address = library.find_symbol(ffi.NULL, _SYMBOL)
    if address is None:
        raise LoaderError(f"this process has no {_SYMBOL}, which stands for a kernel here")
    return Entry("noop", address)


def noop_address() -> int:
    """The address of the entry that does nothing."""
    return int(ffi.cast("uintptr_t", noop().address))


def noop_call() -> Callable[[], int]:
    """A call of the entry that does nothing through cffi alone, with four arguments."""
    entry, result = noop(), ffi.new("TVMFFIAny *")
    return functools.partial(entry.address, entry.handle, ffi.new("TVMFFIAny[]", 5), 5, result)


class Notes:
    """An entry that notes what each call gives it: the arguments, and the current stream."""

    NAME = "fi_ffi.bench.notes"  # in libtvm_ffi's table of functions

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], int]] = []

    def entry(self, signature: Signature) -> Entry | None:
        if signature.result != "void":
            return None
        return register(self.NAME, signature, self._note)

    def _note(self, *arguments: Any) -> None:
        device = next(value.device for value in arguments if isinstance(value, TensorDesc))
        stream = library.lib.TVMFFIEnvGetStream(device.type_code, device.index)
        self.calls.append(([*arguments], int(ffi.cast("uintptr_t", stream))))


@contextmanager
def kernels_replaced(entry_for: Callable[[Signature], Entry | None]) -> Iterator[None]:
    """Let the calls inside the block end in `entry_for(signature)`, on a GPU that need not be
    there and on the CPU, where an entry stays what it is if that is None.

    What `fi_ffi.rmsnorm` and plans have learnt is dropped before the block and after it.
    """
    numpy_entry = reference.entry

    def on_cpu(module: str, signature: Signature, *args: Any, **kwargs: Any) -> Entry:
        entry = entry_for(signature)
        return numpy_entry(module, signature, *args, **kwargs) if entry is None else entry

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (runtime, "kernel_entry", lambda module, signature, *_: entry_for(signature)),
        (reference, "entry", on_cpu),
        (search, "release", lambda: the_lock().default_release),
        (machine, "make_current", lambda device: None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    generation.advance()
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        generation.advance()
