"""The notation of rows: axes such as "b+1" or "2*h/128", conditions such as "d >= top_k".

Conditions are Python expressions. The check, the words of its error and its documentation are
derived from the expression.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """A size as a sum of named sizes with factors and a number, divided by `over`."""

    terms: tuple[tuple[str, int], ...]
    more: int
    over: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def size(self, sizes: Mapping[str, int]) -> int:
        """Compute the size; all of its names must be known."""
        return (sum(sizes[name] * times for name, times in self.terms) + self.more) // self.over


@functools.cache
def parse_axis(text: str) -> Axis:
    """Parse one axis of a row."""
    terms: dict[str, int] = {}
    more = 0
    total, _, over = text.partition("/")
    for part in total.split("+"):
        times, star, name = part.rpartition("*")
        if name.isdigit():
            more += int(name) * int(times or 1)
        else:
            terms[name] = terms.get(name, 0) + (int(times) if star else 1)
    return Axis(tuple(terms.items()), more, int(over or 1))


_WORDS = frozenset({"and", "or", "not", "in", "if", "else", "is", "None", "True", "False"})
# Matches names, but not functions; skips quoted text and the e of a number.
_NAME = re.compile(r"'[^']*'|(?<![\w.])([A-Za-z_]\w*)(?![\w(])")
_CONDITION = re.compile(r"(?:(\w+) == 0 or )?(.+?) (>=|<=|in|==) (.+)")
_MULTIPLE, _EXTREME = re.compile(r"(\w+) % (\w+)"), re.compile(r"(max|min)\((\w+), (\w+)\)")


def ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def round_up(size: int, step: int) -> int:
    """Return the next multiple of a step."""
    return -(-size // step) * step


# Functions that any condition may call.
FUNCTIONS: dict[str, Callable[..., Any]] = {"ceil_div": ceil_div, "round_up": round_up}


@functools.cache
def names_in(text: str) -> tuple[str, ...]:
    """Return the sizes and arguments in a condition, in order."""
    found = (match[1] for match in _NAME.finditer(text))
    return tuple(dict.fromkeys(name for name in found if name and name not in _WORDS))


def replaced(text: str, values: Mapping[str, str]) -> str:
    """Replace the names of a condition by other expressions."""
    return _NAME.sub(lambda match: values.get(match[1] or "", match[0]), text)


@dataclass(frozen=True)
class Condition:
    """A condition on sizes; the words of its error follow from its form."""

    text: str
    guard: str  # the condition holds if this size is 0
    left: str
    operator: str
    right: str

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Condition:
        match = _CONDITION.fullmatch(text)
        told = f"{text!r} is no condition that has words"
        assert match is not None, told
        made = cls(text, match[1] or "", *match.groups()[1:])
        assert made.operator != "==" or made.divides or made.extreme, told
        return made

    @property
    def axis(self) -> str:
        """The size that an error names."""
        return names_in(self.left)[0]

    @property
    def extreme(self) -> tuple[str, str, str] | None:
        """For a size that is a maximum or minimum of two: the function and the two sizes."""
        match = _EXTREME.fullmatch(self.right)
        return match and (match[1], match[2], match[3])

    @property
    def divides(self) -> bool:
        """Whether the condition says that a size is a multiple of something."""
        return _MULTIPLE.fullmatch(self.left) is not None and self.right == "0"

    @property
    def divisors(self) -> tuple[str, ...]:
        """The sizes that the condition divides by; none of them may be 0."""
        multiple = _MULTIPLE.fullmatch(self.left)
        return (multiple[2],) if multiple and multiple[2].isidentifier() else ()

    def expected(self, shown: Callable[[str], str], value: Callable[[str], str]) -> str:
        """Return what must hold, as the text of an f-string.

        `shown` renders a size with its value, and `value` the value of an expression.
        """
        words = self._words(shown, value)
        return f"{words}, for {shown(self.guard)}" if self.guard else words

    def _words(self, shown: Callable[[str], str], value: Callable[[str], str]) -> str:
        left, right = self.left, self.right
        is_named = right.isidentifier()
        multiple, extreme = _MULTIPLE.fullmatch(left), _EXTREME.fullmatch(right)
        if multiple:
            of = shown(multiple[2]) if multiple[2].isidentifier() else multiple[2]
            return f"{multiple[1]} = {value(multiple[1])} to be a multiple of {of}"
        if extreme:
            of = " and ".join(map(shown, extreme.groups()[1:]))
            return f"{left} = {value(right)}, the {extreme[1]} of {of}"
        if self.operator == "in":
            return f"{left} of {_either(right)}"
        if self.operator == ">=":
            return f"{left} of at least {shown(right) if is_named else right}"
        most = shown(right) if is_named else right
        return f"{left} = {value(left)} of at most {most}, as far as the kernel counts"

    @property
    def sentence(self) -> str:
        """What must hold, as a sentence for documentation."""
        multiple, extreme = _MULTIPLE.fullmatch(self.left), _EXTREME.fullmatch(self.right)
        if multiple:
            said = f"{multiple[1]} is a multiple of {multiple[2]}"
        elif extreme:
            said = f"{self.left} is the {extreme[1]} of {extreme[2]} and {extreme[3]}"
        elif self.operator == "in":
            said = f"{self.left} is {_either(self.right)}"
        else:
            how = {">=": "at least", "<=": "at most"}[self.operator]
            said = f"{self.left} is {how} {self.right}"
        return f"{said}, unless {self.guard} is 0." if self.guard else f"{said}."


def _either(numbers: str) -> str:
    return " or ".join(re.findall(r"\d+", numbers))
