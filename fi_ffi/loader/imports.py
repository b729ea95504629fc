"""Libraries that TVM's compiler made, or that have modules inside: what is filled in at loading.

Such a library calls what it needs through variables of its own (`__TVMFFIFunctionCall`,
`__TVMBackendParallelLaunch`), finds functions of others by the module object that it is
(`__tvm_ffi__library_ctx`), and has the modules that it imports as bytes inside
(`__tvm_ffi__library_bin`).  A null pointer in a variable is called all the same, and ends the
process.  libtvm_ffi fills them in, as for `tvm_ffi.load_module`; what a runtime that is not
here would have brought is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import library_function
from fi_ffi.abi.objects import Object
from fi_ffi.errors import KernelError, LoaderError

_ADVICE = (
    "Load the runtime that has it first: for what apache-tvm compiled, "
    "fi_ffi.module('.../tvm/lib/libtvm_runtime.so')"
)


def fill_in(handle: Any, path: str, name: str, context: Sequence[str]) -> Object | None:
    """Fill in a library's variables, and read the modules inside; the module object it then is.

    `name` is what it was opened by: libtvm_ffi opens the same one by it.  None for a library
    without such variables.  Raises `LoaderError` where something stays out.
    """
    if not context:
        return None
    try:
        root = library_function("ffi.Module.load_from_file.so")(name, "so")
    except KernelError as error:
        raise LoaderError(
            f"{path} has a module inside that cannot be read: {error.message}. {_ADVICE}"
        ) from error
    # For ever, as the library is: it has the address.
    library.lib.TVMFFIObjectIncRef(root.handle)
    missing = [
        symbol for symbol in context if symbol.startswith("__TVM") and not _fill(handle, symbol)
    ]
    if missing:
        names = ", ".join(symbol.removeprefix("__") for symbol in missing)
        raise LoaderError(f"{path} calls {names}, and nothing in this process has it. {_ADVICE}")
    found: Object = root
    return found


def _fill(handle: Any, symbol: str) -> bool:
    """Fill in a variable that is still empty; whether it is full."""
    variable = ffi.cast("void **", library.find_symbol(handle, symbol))
    if variable[0] == ffi.NULL:
        # Those of libtvm_ffi are registered by TVM's runtime, which need not be here for them.
        address = library.find_symbol(ffi.NULL, symbol.removeprefix("__"))
        if address is not None:
            variable[0] = address
    return bool(variable[0] != ffi.NULL)
