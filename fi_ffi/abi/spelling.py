"""Types as TVM-FFI's signatures spell them, such as `Optional<Array<ffi.Tensor>>`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fi_ffi.abi.signature import split_top
from fi_ffi.errors import AbiError

FUNCTION = "ffi.Function"

# Names of one meaning: of C++'s own types, and of the containers that have no element type.
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
class Spelled:
    """A type: its name, the same for what means the same, and the types inside it."""

    name: str
    args: tuple[Spelled, ...] = ()


_DEEPEST = 32  # of types inside types


def parse_type(text: str) -> Spelled:
    """Read a type; `AbiError` where its brackets do not match."""
    return _parse(text, 0)


@functools.cache
def _parse(text: str, depth: int) -> Spelled:
    text = text.strip()
    if depth > _DEEPEST:
        raise AbiError(f"a TVM-FFI type nested more than {_DEEPEST} deep: {text!r:.200}")
    if text.startswith("("):  # a function's type is its signature
        return Spelled(FUNCTION)
    name, bracket, rest = text.partition("<")
    known = _SAME.get(name, name)
    if known == FUNCTION or (not bracket and not set(name) & set(">(),")):
        return Spelled(known)
    parts = split_top(rest.removesuffix(">") + ")") if rest.endswith(">") else None
    if parts is None or parts[1] or not all(part.strip() for part in parts[0]):
        raise AbiError(f"not a TVM-FFI type: {text!r:.200}")
    args = tuple(_parse(part, depth + 1) for part in parts[0])
    if known == "RValueRef" and args:  # a value that may be moved from; a copy does as well
        return args[0]
    if name == "std::array":  # its second argument is a number
        args = args[:1]
    return Spelled(known, args)
