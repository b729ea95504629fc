"""A TVM-FFI function's signature, as the function itself prints it, and the types in it.

A typed function that is called with a wrong number of arguments refuses before
it looks at any of them, and its error spells out every parameter:

    Mismatched number of arguments when calling:
    `rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void`.
    Expected 5 but got 0 arguments

A function of CuTe DSL has words of its own, which also name its parameters, tell the shapes
and dtypes that it was compiled for, and leave out that it returns nothing:

    Expects 3 parameters when calling:
    `scale(x: Tensor([n0, 128], bfloat16), factor: float32, mask: None)`
"""

from __future__ import annotations

import functools
import re
from collections import deque
from dataclasses import dataclass

from fi_ffi.errors import AbiError

# Two patterns, each found in time linear in the message.
_BEFORE = "Mismatched number of arguments when calling: `"
_AFTER = re.compile(r"`\. Expected (?P<count>\d+) but got \d+ arguments")
_CUTE = re.compile(r"Expects (?P<count>\d{1,3}) parameters when calling: `(?P<text>[^`]+)`")
_OPEN, _CLOSE = "(<[{", ")>]}"


@dataclass(frozen=True)
class Signature:
    """Name, parameter types in order, and result type, in TVM-FFI's own spelling.

    `named` is what a function of CuTe DSL says of each parameter: its name and its type in
    CuTe's spelling, such as "x: Tensor([n0, 128], bfloat16)", where n0 stands for any size.
    """

    name: str
    params: tuple[str, ...]
    result: str = "void"
    named: tuple[str, ...] = ()

    @property
    def spelled(self) -> tuple[str, ...]:
        """Each parameter as the function's own account of itself has it."""
        return self.named or tuple(f"{i}: {param}" for i, param in enumerate(self.params))

    def __str__(self) -> str:
        result = "" if self.named else f" -> {self.result}"
        return f"{self.name}({', '.join(self.spelled)}){result}"

    def same_types(self, other: Signature) -> bool:
        """Equal but for the name (one entry may be exported under several) and `named`."""
        return (self.params, self.result) == (other.params, other.result)


def parse_signature(text: str) -> Signature:
    """Parse `name(0: T0, 1: T1, ...) -> R`, or CuTe's `name(a: T0, b: T1, ...)`.

    `AbiError` where it is anything else.
    """
    name, paren, rest = text.partition("(")
    parts = split_top(rest) if paren else None
    if parts is None:
        raise AbiError(f"not a TVM-FFI signature: {text!r:.300}")
    inner, tail = parts
    if inner and not tail and all(_NAMED.match(part) for part in inner):
        named = tuple(part.strip() for part in inner)
        types = tuple(_of_cute(part.partition(":")[2]) for part in named)
        return Signature(name.strip(), types, named=named)
    params = []
    for index, part in enumerate(inner):
        number, colon, param = part.partition(":")
        if not colon or number.strip() != str(index) or not param.strip():
            raise AbiError(f"parameter {index} is {part!r:.80} in TVM-FFI signature {text!r:.300}")
        params.append(param.strip())
    arrow, result = tail.strip()[:2], tail.strip()[2:].strip()
    if arrow != "->" or not result:
        raise AbiError(f"a TVM-FFI signature without a result type: {text!r:.300}")
    return Signature(name.strip(), tuple(params), result)


_NAMED = re.compile(r"\s*[A-Za-z_]\w*: ?\S")

# How CuTe's spelling of a type begins -> the type of TVM-FFI that such a parameter takes.
_OF_CUTE = {
    r"Tensor\(": "DLTensor*",
    r"Shape\(": "ffi.Shape",
    r"(Stream|DataPointer)$": "void*",
    r"None$": "None",
    r"(u?int\d+$|Int\()": "int",
    r"(bool$|Bool\()": "bool",
    r"(b?float\w+$|Float\()": "float",
}


def _of_cute(text: str, depth: int = 0) -> str:
    """The TVM-FFI type that a parameter of CuTe takes."""
    text = text.strip()
    inner = text.removeprefix("Tuple[") if depth <= _DEEPEST else text
    if inner != text and (parts := split_top(inner.removesuffix("]") + ")")):
        return f"Tuple<{', '.join(_of_cute(part, depth + 1) for part in parts[0])}>"
    for pattern, name in _OF_CUTE.items():
        if re.match(pattern, text):
            return name
    raise AbiError(f"not a type of CuTe's: {text!r:.200}")


def signature_from_mismatch(message: str) -> Signature:
    """The signature inside the refusal of a call with a wrong number of arguments."""
    if told := _CUTE.search(message):
        return _counted(told["text"], told["count"], message)
    start = message.find(_BEFORE) + len(_BEFORE)
    last = deque(_AFTER.finditer(message, start) if start >= len(_BEFORE) else (), maxlen=1)
    if not last:
        raise AbiError(f"the function's refusal tells no signature: {message!r:.300}")
    found = last[0]
    return _counted(message[start : found.start()], found["count"], message)


def _counted(text: str, count: str, message: str) -> Signature:
    signature = parse_signature(text)
    if str(len(signature.params)) != count:
        raise AbiError(f"{len(signature.params)} parameters in the refusal {message!r:.300}")
    return signature


def split_top(text: str) -> tuple[list[str], str] | None:
    """Split at the commas of this nesting level up to its closing parenthesis."""
    parts: list[str] = []
    depth, start, previous = 0, 0, ""
    for position, char in enumerate(text):
        if char in _OPEN:
            depth += 1
        elif char == ">" and previous == "-":  # the arrow of a function type
            pass
        elif char in _CLOSE and depth:
            depth -= 1
        elif char == ")" and not depth:
            last = text[start:position]
            if last.strip() or parts:
                parts.append(last)
            return parts, text[position + 1 :]
        elif char == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
        previous = char
    return None


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
class TypeExpr:
    """A type: its name, the same for what means the same, and the types inside it."""

    name: str
    args: tuple[TypeExpr, ...] = ()


_DEEPEST = 32  # of types inside types


def parse_type(text: str) -> TypeExpr:
    """Read a type; `AbiError` where its brackets do not match."""
    return _parse(text, 0)


@functools.cache
def _parse(text: str, depth: int) -> TypeExpr:
    text = text.strip()
    if depth > _DEEPEST:
        raise AbiError(f"a TVM-FFI type nested more than {_DEEPEST} deep: {text!r:.200}")
    if text.startswith("("):  # a function's type is its signature
        return TypeExpr(FUNCTION)
    name, bracket, rest = text.partition("<")
    known = _SAME.get(name, name)
    if known == FUNCTION or (not bracket and not set(name) & set(">(),")):
        return TypeExpr(known)
    parts = split_top(rest.removesuffix(">") + ")") if rest.endswith(">") else None
    if parts is None or parts[1] or not all(part.strip() for part in parts[0]):
        raise AbiError(f"not a TVM-FFI type: {text!r:.200}")
    args = tuple(_parse(part, depth + 1) for part in parts[0])
    if known == "RValueRef" and args:  # a value that may be moved from; a copy does as well
        return args[0]
    if name == "std::array":  # its second argument is a number
        args = args[:1]
    return TypeExpr(known, args)
