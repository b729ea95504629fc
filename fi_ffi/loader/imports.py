"""Variables to fill in while loading libraries that TVM's compiler made or that embed modules.

Such a library calls functions through variables of its own (`__TVMFFIFunctionCall`,
`__TVMBackendParallelLaunch`), finds other libraries' functions through its module object
(`__tvm_ffi__library_ctx`), and embeds the modules that it imports (`__tvm_ffi__library_bin`). It
would call a null pointer too, which ends the process. libtvm_ffi fills in the variables, as for
`tvm_ffi.load_module`. If a runtime that should provide one is missing, the library is refused.
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
    """Fill in a library's variables and read its embedded modules; return its module object.

    `name` is the name it was loaded by, so that libtvm_ffi opens the same library. Returns None for
    a library without such variables. Raises `LoaderError` if one cannot be filled in.
    """
    if not context:
        return None
    try:
        root = library_function("ffi.Module.load_from_file.so")(name, "so")
    except KernelError as error:
        raise LoaderError(
            f"{path} has a module inside that cannot be read: {error.message}. {_ADVICE}"
        ) from error
    # Never released, because the library keeps the address.
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
    """Fill in a variable if it is empty; return whether it is filled."""
    variable = ffi.cast("void **", library.find_symbol(handle, symbol))
    if variable[0] == ffi.NULL:
        # TVM's runtime would register libtvm_ffi's functions; here they are looked up without it.
        address = library.find_symbol(ffi.NULL, symbol.removeprefix("__"))
        if address is not None:
            variable[0] = address
    return bool(variable[0] != ffi.NULL)
