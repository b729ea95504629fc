"""The types of a signature: containers, their items, and one name for each synonym."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fi_ffi.abi.signature import split_top
from fi_ffi.errors import AbiError

_DEEPEST = 32  # nesting of types
FUNCTION = "ffi.Function"

# Synonyms -> one name: C++'s own types, and containers without an element type.
_SAME = {
    "std::string": "str",
    "ffi.String": "str",
    "ffi.Bytes": "bytes",
    "TVMFFIByteArray*": "bytes",
    "AnyView": "Any",
    "ffi.Array": "Array",
    "ffi.List": "List",
    "ffi.Map": "Map",
    "ffi.Dict": "Dict",
    "std::optional": "Optional",
    "std::vector": "Array",
    "std::array": "Array",
    "std::tuple": "Tuple",
    "std::variant": "Variant",
    "std::map": "Map",
    "std::unordered_map": "Map",
    "std::function": FUNCTION,
}


@dataclass(frozen=True)
class TypeExpr:
    """A type: its name, with synonyms unified, and its type arguments."""

    name: str
    args: tuple[TypeExpr, ...] = ()


def parse_type(text: str) -> TypeExpr:
    """Parse a type; `AbiError` if its brackets do not match."""
    return _parse(text, 0)


@functools.cache
def _parse(text: str, depth: int) -> TypeExpr:
    text = text.strip()
    if depth > _DEEPEST:
        raise AbiError(f"a TVM-FFI type nested more than {_DEEPEST} deep: {text!r:.200}")
    if text.startswith("("):  # a function's type is written as its signature
        return TypeExpr(FUNCTION)
    name, bracket, rest = text.partition("<")
    known = _SAME.get(name, name)
    if known == FUNCTION or (not bracket and not set(name) & set(">(),")):
        return TypeExpr(known)
    parts = split_top(rest.removesuffix(">") + ")") if rest.endswith(">") else None
    if parts is None or parts[1] or not all(part.strip() for part in parts[0]):
        raise AbiError(f"not a TVM-FFI type: {text!r:.200}")
    args = tuple(_parse(part, depth + 1) for part in parts[0])
    if known == "RValueRef" and args:  # a value that may be moved from; passing a copy is valid too
        return args[0]
    if name == "std::array":  # the second argument is a length
        args = args[:1]
    return TypeExpr(known, args)
