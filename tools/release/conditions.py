"""Evaluation of `#if` conditions, with unknown values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fi_ffi.errors import BuildError

_TOKEN = re.compile(r"defined\s*\(\s*\w+\s*\)|defined\s+\w+|\w+|&&|\|\||[<>=!]=|[()!<>+\-*/%]")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)[uUlL]*")
_WORD = re.compile(r"\w+")
_LONGEST = 40  # characters of a number
_MOST_NESTED = 50  # parentheses and negations
_COMPARE = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b,
}  # fmt: skip
_ARITHMETIC = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}

# None: unknown.
_Value = int | None
# Returns whether a macro can only be set on the command line.
IsSwitch = Callable[[str], bool]


def truth(expression: str, macros: Mapping[str, str], is_switch: IsSwitch) -> bool | None:
    """Return whether a condition holds; None if it depends on an unknown macro.

    Raises `BuildError` if it is nested more than 50 deep.
    """
    value = _Parser(expression, macros, is_switch).either()
    return None if value is None else bool(value)


class _Parser:
    def __init__(self, expression: str, macros: Mapping[str, str], is_switch: IsSwitch) -> None:
        self.tokens: list[str] = _TOKEN.findall(expression)[::-1]
        self.macros, self.is_switch, self.depth = macros, is_switch, 0

    def next(self, *wanted: str) -> str | None:
        if self.tokens and (not wanted or self.tokens[-1] in wanted):
            return self.tokens.pop()
        return None

    def either(self) -> _Value:
        value = self.both()
        while self.next("||"):
            other = self.both()
            known = (value, other)
            value = 1 if any(known) else None if None in known else 0
        return value

    def both(self) -> _Value:
        value = self.compared()
        while self.next("&&"):
            known = (value, self.compared())
            value = 0 if 0 in known else None if None in known else 1
        return value

    def compared(self) -> _Value:
        value = self.sum()
        while sign := self.next(*_COMPARE):
            other = self.sum()
            value = None if None in (value, other) else int(_COMPARE[sign](value, other))
        return value

    def sum(self) -> _Value:
        value = self.one()
        while sign := self.next(*_ARITHMETIC):
            other = self.one()
            value = None if None in (value, other) else _ARITHMETIC[sign](value, other)
            # Of no type that the preprocessor has.
            value = None if value is not None and abs(value) >> 64 else value
        return value

    def one(self) -> _Value:
        if self.next("!"):
            value = self.nested(self.one)
            return None if value is None else int(not value)
        if self.next("("):
            value = self.nested(self.either)
            self.next(")")
            return value
        token = self.next()
        if token is None:
            return None
        first, *rest = _WORD.findall(token) or [token]
        if first == "defined" and rest:
            (name,) = rest
            return 1 if name in self.macros else 0 if self.is_switch(name) else None
        return self.number(token, 8)

    def nested(self, read: Callable[[], _Value]) -> _Value:
        self.depth += 1
        if self.depth > _MOST_NESTED:
            raise BuildError(f"the condition is nested more than {_MOST_NESTED} deep")
        value = read()
        self.depth -= 1
        return value

    def number(self, token: str, depth: int) -> _Value:
        found = _NUMBER.fullmatch(token) if len(token) <= _LONGEST else None
        if found is not None:
            digits = found[1]
            is_octal = digits.isdigit() and digits[0] == "0"
            return int(digits, 8 if is_octal else 0)
        if depth and token in self.macros:
            return self.number(self.macros[token], depth - 1)
        return 0 if self.is_switch(token) else None
