"""Evaluation of `#if` conditions, with unknown values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_TOKEN = re.compile(r"\s*(defined\s*\(\s*\w+\s*\)|defined\s+\w+|\w+|&&|\|\||[<>=!]=|[()!<>+\-*/%])")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|\d+)[uUlL]*")
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
    """Return whether a condition holds; None if it depends on an unknown macro."""
    value = _Parser(expression, macros, is_switch).either()
    return None if value is None else bool(value)


class _Parser:
    def __init__(self, expression: str, macros: Mapping[str, str], is_switch: IsSwitch) -> None:
        self.tokens = [match[1] for match in _TOKEN.finditer(expression)]
        self.macros, self.is_switch = macros, is_switch

    def next(self, *wanted: str) -> str | None:
        if self.tokens and (not wanted or self.tokens[0] in wanted):
            return self.tokens.pop(0)
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
        return value

    def one(self) -> _Value:
        if self.next("!"):
            value = self.one()
            return None if value is None else int(not value)
        if self.next("("):
            value = self.either()
            self.next(")")
            return value
        token = self.next()
        if token is None:
            return None
        if token.startswith("defined") and token != "defined":
            name = re.findall(r"\w+", token)[1]
            return 1 if name in self.macros else 0 if self.is_switch(name) else None
        return self.number(token, 8)

    def number(self, token: str, depth: int) -> _Value:
        found = _NUMBER.fullmatch(token)
        if found is not None:
            return int(found[1], 0)
        if depth and token in self.macros:
            return self.number(self.macros[token], depth - 1)
        return 0 if self.is_switch(token) else None
