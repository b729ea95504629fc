"""Entries: anything with TVM-FFI's calling convention, called one way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check_kernel, take_raised
from fi_ffi.abi.objects import Array, CallArena, Function, Module, Unique, find_global, set_global
from fi_ffi.abi.signature import Signature, signature_from_mismatch
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.abi.values import make_function, pack_arguments, unpack
from fi_ffi.errors import AbiError, KernelError, LoaderError


class Entry(Unique):
    """A function pointer with the calling convention, and the handle it wants first.

    An exported symbol has a null handle; a function object is its own, and
    `owner` keeps it alive.
    """

    __slots__ = ("address", "handle", "name", "owner")

    def __init__(self, name: str, address: Any, handle: Any = ffi.NULL, owner: object = None):
        self.name = name
        self.address = ffi.cast("TVMFFISafeCallType", address)
        self.handle = handle
        self.owner = owner

    @classmethod
    def of(cls, function: Function, name: str) -> Entry:
        return cls(name, function.safe_call, function.handle, function)

    def __call__(self, *args: object) -> Any:
        """Call with Python values; returns a Python value or an owned object."""
        arena = CallArena(self.name)
        try:
            return self.invoke(pack_arguments(args, arena), len(args))
        finally:
            arena.end()

    def invoke(self, packed: Any, count: int) -> Any:
        """Call with packed arguments; returns a Python value or an owned object."""
        # A call's own: what an entry that fails has written there is nobody's to read or release.
        result = ffi.new("TVMFFIAny *")
        check_kernel(self.address(self.handle, packed, count, result), self.name)
        return unpack(result, owned=True)


# More arguments than any function takes.  Calling with none would do as well for
# a function that has parameters, but would run one that has none.
PROBE_ARGUMENTS = 512
_PROBE = ffi.new("TVMFFIAny[]", PROBE_ARGUMENTS)


def probe(entry: Entry) -> Signature:
    """The entry's own signature, read from the refusal of a call it cannot accept.

    No CUDA work is done and no memory touched: a typed function, as all of FlashInfer's
    are, counts its arguments before anything else.  A packed one, which accepts any
    number of them, is run by this, and has no signature to tell: `AbiError`.
    """
    result = ffi.new("TVMFFIAny *")
    if entry.address(entry.handle, _PROBE, PROBE_ARGUMENTS, result):
        refusal = take_raised(entry.name)
        if isinstance(refusal, KernelError):
            return signature_from_mismatch(refusal.message)
        raise refusal
    unpack(result, owned=True)
    raise AbiError(f"{entry.name} takes any arguments: it has no signature of its own")


def global_function(name: str) -> Entry:
    """A function from libtvm_ffi's global table, such as `ffi.ArraySize`."""
    return Entry.of(find_global(name), name)


# A function of libtvm_ffi's own, looked up once: it has them as long as it is loaded.
library_function = functools.cache(global_function)


def make_array(values: Sequence[object]) -> Array:
    """An owned Array of `values`."""
    array: Array = library_function("ffi.Array")(*values)
    return array


def array_values(array: Array) -> list[Any]:
    """The elements of an Array, as Python values or owned objects."""
    size, item = library_function("ffi.ArraySize"), library_function("ffi.ArrayGetItem")
    return [item(array, i) for i in range(size(array))]


def tensors_of(array: Array) -> list[TensorDesc]:
    """The tensors of an Array of them, which keeps them alive."""
    return [tensor.described() for tensor in array_values(array)]


def module_function(module: Module, name: str) -> Entry:
    """The function called `name` of a Module object; `LoaderError` where there is none."""
    function = library_function("ffi.ModuleGetFunction")(module, name, False)
    if not isinstance(function, Function):
        raise LoaderError(f"the module object has no function {name!r}")
    return Entry.of(function, name)


def register(name: str, signature: Signature, function: Callable[..., Any]) -> Entry:
    """Make a Python function a TVM-FFI function, in the global table under `name`.

    It refuses a wrong number of arguments in the same words as a compiled one, so
    `probe` tells its signature; an exception becomes a TVM-FFI error.
    """
    made = make_function(name, function, signature)
    set_global(name, made)
    return Entry.of(made, name)
