"""Entries: anything with TVM-FFI's calling convention, called one way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fi_ffi.abi import forks, library, types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check, check_kernel, prepare_untold, raise_untold, set_raised
from fi_ffi.abi.objects import Array, Function, Module
from fi_ffi.abi.signature import Signature, signature_from_mismatch
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.abi.values import check_object, desc_from_dl_tensor, pack, unpack
from fi_ffi.errors import AbiError, ArgumentTypeError, KernelError, LoaderError


class Entry:
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
        keep: list[object] = []
        packed = ffi.new("TVMFFIAny[]", max(len(args), 1))
        for i, value in enumerate(args):
            pack(packed[i], value, keep, self.name, str(i))
        result = ffi.new("TVMFFIAny *")
        check_kernel(self.address(self.handle, packed, len(args), result), self.name)
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
    try:
        check(entry.address(entry.handle, _PROBE, PROBE_ARGUMENTS, result), entry.name)
    except KernelError as refusal:
        return signature_from_mismatch(refusal.message)
    unpack(result, owned=True)
    raise AbiError(f"{entry.name} takes any arguments: it has no signature of its own")


# libtvm_ffi leaves the locking of its global table to its callers, and a cffi call
# runs without the GIL.
_table = threading.Lock()
forks.renew(globals(), "_table", threading.Lock)


def global_function(name: str) -> Entry:
    """A function from libtvm_ffi's global table, such as `ffi.ArraySize`."""
    array, _buffer = library.byte_array(name.encode())
    slot = ffi.new("TVMFFIObjectHandle *")
    with _table:
        check(library.lib.TVMFFIFunctionGetGlobal(array, slot), name)
    if slot[0] == ffi.NULL:
        raise LoaderError(f"libtvm_ffi has no global function {name!r}")
    return Entry.of(Function(slot[0]), name)


def make_array(values: Sequence[object]) -> Array:
    """An owned Array of `values`."""
    array: Array = global_function("ffi.Array")(*values)
    return array


def array_values(array: Array) -> list[Any]:
    """The elements of an Array, as Python values or owned objects."""
    size, item = global_function("ffi.ArraySize"), global_function("ffi.ArrayGetItem")
    return [item(array, i) for i in range(size(array))]


def module_function(module: Module, name: str) -> Entry:
    """The function called `name` of a Module object; `LoaderError` where there is none."""
    function = global_function("ffi.ModuleGetFunction")(module, name, False)
    if not isinstance(function, Function):
        raise LoaderError(f"the module object has no function {name!r}")
    return Entry.of(function, name)


# Functions given to libtvm_ffi stay for the life of the process: it may call them
# until it is unloaded, and a destructor that calls back into Python could run
# after the interpreter is gone.
_SAFE_CALL = "int(void *, const TVMFFIAny *, int32_t, TVMFFIAny *)"
_IMMORTAL: list[object] = []


def register(name: str, signature: Signature, function: Callable[..., Any]) -> Entry:
    """Make a Python function a TVM-FFI function, in the global table under `name`.

    It refuses a wrong number of arguments in the same words as a compiled one, so
    `probe` tells its signature; an exception becomes a TVM-FFI error.
    """
    made, callback = make_function(name, function, signature)
    _IMMORTAL.append(callback)
    array, _buffer = library.byte_array(name.encode())
    with _table:
        check(library.lib.TVMFFIFunctionSetGlobal(array, made.handle, 1), name)
    return Entry.of(made, name)


def make_function(
    name: str, function: Callable[..., Any], signature: Signature | None = None
) -> tuple[Function, object]:
    """A Function object that calls a Python one, and what must live as long as it does.

    With a signature it refuses a wrong number of arguments, as `register` has it.
    """

    def call(self: Any, args: Any, count: int, result: Any) -> int:
        try:
            if signature is not None and count != len(signature.params):
                raise TypeError(
                    f"Mismatched number of arguments when calling: `{signature}`. "
                    f"Expected {len(signature.params)} but got {count} arguments"
                )
            value = function(*(_argument(args[i]) for i in range(count)))
            _return(result, value, name)
        except BaseException as error:
            set_raised(error)
            return -1
        return 0

    prepare_untold()
    callback = ffi.callback(_SAFE_CALL, call, error=-1, onerror=raise_untold)
    slot = ffi.new("TVMFFIObjectHandle *")
    check(library.lib.TVMFFIFunctionCreate(ffi.NULL, callback, ffi.NULL, slot), name)
    return Function(slot[0]), callback


def _return(result: Any, value: object, name: str) -> None:
    """Write a callback's result: unlike an argument it must own what it names."""
    if isinstance(value, TensorDesc):
        expected = "a Tensor object: a view would outlive what it is a view of"
        raise ArgumentTypeError(name, "result", got=value, expected=expected)
    view, keep = ffi.new("TVMFFIAny *"), list[object]()
    pack(view[0], value, keep, name, "result")
    check(library.lib.TVMFFIAnyViewToOwnedAny(view, result), name)


def _argument(slot: Any) -> Any:
    if slot.type_index == types.TENSOR:  # seen as the view it is of
        check_object(slot, types.TENSOR)
        return desc_from_dl_tensor(ffi.cast("FiFfiTensorObject *", slot.v_ptr).cell)
    return unpack(slot, owned=False)
