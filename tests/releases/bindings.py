"""The interface a FlashInfer release declares, read from its binding sources."""

from __future__ import annotations

import re

from fi_ffi.abi.signature import Signature

_EXPORT = re.compile(r"TVM_FFI_DLL_EXPORT_TYPED_FUNC\(\s*(\w+)\s*,\s*([\w:]+)\s*\)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

# A C++ parameter type, as TVM-FFI prints it.
_TYPES = {
    "TensorView": "DLTensor*",
    "Tensor": "ffi.Tensor",
    "double": "float",
    "float": "float",
    "int64_t": "int",
    "int32_t": "int",
    "int": "int",
    "bool": "bool",
    "std::string": "str",
    "String": "str",
    "void": "void",
}
_GENERIC = re.compile(r"(Optional|Array|Tuple)<(.*)>")


def abi_type(text: str) -> str:
    """`Optional<ffi::Tensor>` is `Optional<ffi.Tensor>`, `double` is `float`."""
    text = re.sub(r"\b(const|tvm|ffi)\b(::)?|&", "", text).strip().removeprefix("::")
    generic = _GENERIC.fullmatch(text)
    if generic:
        inner = ", ".join(abi_type(part) for part in generic[2].split(","))
        return f"{generic[1]}<{inner}>"
    return _TYPES[text]


def exported(source: str) -> dict[str, Signature]:
    """Every function that a binding source exports, by the exported name."""
    source = _COMMENT.sub(" ", source)
    found = {}
    for symbol, function in _EXPORT.findall(source):
        name = function.rpartition("::")[2]
        declaration = re.search(rf"\b(\w[\w:<>]*)\s+{name}\s*\(([^)]*)\)", source)
        assert declaration, f"{function} is exported and not declared"
        params = [_without_name(part) for part in _split(declaration[2])]
        types = tuple(abi_type(param) for param in params)
        found[symbol] = Signature(symbol, types, abi_type(declaration[1]))
    return found


def _split(text: str) -> list[str]:
    """Parameters, split at the commas outside of template arguments."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "<") - (char == ">")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part.strip()]


def _without_name(parameter: str) -> str:
    return re.sub(r"\s+\w+\s*(=.*)?$", "", parameter.strip())
