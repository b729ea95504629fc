"""TVM-FFI function signatures, parsed from the functions' own error messages.

A typed function refuses a wrong number of arguments before it looks at any of them. Its error
spells out every parameter:

    Mismatched number of arguments when calling:
    `rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void`.
    Expected 5 but got 0 arguments

A function of CuTe DSL has another message. It also names the parameters, gives the shapes and
dtypes that the function was compiled for, and omits the result type, which is void:

    Expects 3 parameters when calling:
    `scale(x: Tensor([n0, 128], bfloat16), factor: float32, mask: None)`
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from fi_ffi.errors import AbiError

# Both patterns match in time linear in the message's length.
_BEFORE = "Mismatched number of arguments when calling: `"
_AFTER = re.compile(r"`\. Expected (?P<count>\d+) but got \d+ arguments")
_CUTE = re.compile(r"Expects (?P<count>\d{1,3}) parameters when calling: `(?P<text>[^`]+)`")
_OPEN, _CLOSE = "(<[{", ")>]}"


@dataclass(frozen=True)
class Signature:
    """Name, parameter types in order, and result type, in TVM-FFI's spelling.

    `named` has the parameters of a CuTe DSL function with names and types in CuTe's spelling, such
    as "x: Tensor([n0, 128], bfloat16)", where n0 is any size.
    """

    name: str
    params: tuple[str, ...]
    result: str = "void"
    named: tuple[str, ...] = ()

    @property
    def spelled(self) -> tuple[str, ...]:
        """Each parameter as the function itself prints it."""
        return self.named or tuple(f"{i}: {param}" for i, param in enumerate(self.params))

    def __str__(self) -> str:
        result = "" if self.named else f" -> {self.result}"
        return f"{self.name}({', '.join(self.spelled)}){result}"

    def same_types(self, other: Signature) -> bool:
        """Compare parameter and result types only: an entry may be exported under several names."""
        return (self.params, self.result) == (other.params, other.result)


def parse_signature(text: str) -> Signature:
    """Parse `name(0: T0, 1: T1, ...) -> R`, or CuTe's `name(a: T0, b: T1, ...)`.

    Raises `AbiError` for any other text.
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


_DEEPEST = 32  # nesting of types
_NAMED = re.compile(r"\s*[A-Za-z_]\w*: ?\S")

# Pattern at the start of a CuTe type -> the TVM-FFI type that such a parameter takes.
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
    """Return the TVM-FFI type of a CuTe parameter."""
    text = text.strip()
    inner = text.removeprefix("Tuple[") if depth <= _DEEPEST else text
    if inner != text and (parts := split_top(inner.removesuffix("]") + ")")):
        return f"Tuple<{', '.join(_of_cute(part, depth + 1) for part in parts[0])}>"
    for pattern, name in _OF_CUTE.items():
        if re.match(pattern, text):
            return name
    raise AbiError(f"not a type of CuTe's: {text!r:.200}")


def signature_from_mismatch(message: str) -> Signature:
    """Parse the signature in the error of a call with a wrong number of arguments."""
    if found := _CUTE.search(message):
        return _counted(found["text"], found["count"], message)
    start = message.find(_BEFORE) + len(_BEFORE)
    last = deque(_AFTER.finditer(message, start) if start >= len(_BEFORE) else (), maxlen=1)
    if not last:
        raise AbiError(f"the function's error contains no signature: {message!r:.300}")
    found = last[0]
    return _counted(message[start : found.start()], found["count"], message)


def _counted(text: str, count: str, message: str) -> Signature:
    signature = parse_signature(text)
    if str(len(signature.params)) != count:
        raise AbiError(f"{len(signature.params)} parameters in the refusal {message!r:.300}")
    return signature


def split_top(text: str) -> tuple[list[str], str] | None:
    """Split at this nesting level's commas, up to its closing parenthesis; also return the rest."""
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
