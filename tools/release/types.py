"""C++ types, in TVM-FFI's spelling in a function's signature."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fi_ffi.errors import BuildError
from tools.release.cpp import split

# The spelling in TVM-FFI's own headers; a test compiles a function of each type and asks it.
PRINTED = {
    "TensorView": "DLTensor*",
    "Tensor": "ffi.Tensor",
    "Shape": "ffi.Shape",
    "Module": "ffi.Module",
    "Function": "ffi.Function",
    "ObjectRef": "ffi.Object",
    "Any": "Any",
    "double": "float",
    "float": "float",
    "int64_t": "int",
    "uint64_t": "int",
    "int32_t": "int",
    "uint32_t": "int",
    "int": "int",
    "size_t": "int",
    "bool": "bool",
    "std::string": "std::string",
    "String": "str",
    "DLDataType": "DataType",
    "DLDevice": "Device",
    "void": "void",
    "void*": "void*",
}
_GENERIC = re.compile(r"(Optional|Array|Map|Tuple|Variant)<(.*)>")
_MOST_NESTED = 32  # generics and aliases
_LONGEST = 1000  # characters of a type; aliases within aliases could make it any length
_WORDS = re.compile(r"\b(?:const|ffi|tvm|struct|enum)\b(?:\s*::)?|&|^::")


def abi_type(text: str, aliases: Mapping[str, str] | None = None, depth: int = 0) -> str:
    """Return TVM-FFI's spelling: `Optional<DLTensor*>` for `Optional<ffi::TensorView>`.

    `aliases` maps names declared by `using` to types, and enumerations to "int"; TVM-FFI supports
    no other enumerations.
    """
    if depth > _MOST_NESTED or len(text) > _LONGEST:
        raise BuildError(
            f"the C++ type {text!r:.80} has more than {_LONGEST} characters, or is nested more "
            f"than {_MOST_NESTED} deep"
        )
    plain = " ".join(_WORDS.sub(" ", text).split()).removeprefix("::").strip()
    generic = _GENERIC.fullmatch(plain)
    if generic:
        inner = ", ".join(abi_type(part, aliases, depth + 1) for part in split(generic[2]))
        found = f"{generic[1]}<{inner}>"
        if len(found) > _LONGEST:
            raise BuildError(f"the C++ type {text!r:.80} has more than {_LONGEST} characters")
        return found
    if plain in PRINTED:
        return PRINTED[plain]
    last = plain.rpartition("::")[2]
    if aliases and last in aliases:
        return abi_type(aliases[last], aliases, depth + 1)
    raise BuildError(f"the C++ type {text!r:.200} has no known TVM-FFI name")
