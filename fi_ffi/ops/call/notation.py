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
_MULTIPLE = re.compile(r"(\w+) % (\w+) == 0")
_EXTREME = re.compile(r"(max|min)\(\w+, \w+\)$")


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
    """A condition on sizes; the words of its error follow from its form.

    `operator` is ">=", "<=" or "in", "%" for a size that is a multiple of `right`, or "max" or
    "min" for one that is the greater or the less of two.
    """

    text: str
    guard: str  # the condition holds if this size is 0
    left: str
    operator: str
    right: str

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Condition:
        match = _CONDITION.fullmatch(text)
        assert match is not None, f"{text!r} is no condition that has words"
        guard, left, operator, right = match.groups("")
        if operator == "==":
            multiple, extreme = _MULTIPLE.fullmatch(f"{left} == {right}"), _EXTREME.match(right)
            if multiple is not None:
                left, operator, right = multiple[1], "%", multiple[2]
            else:
                assert extreme is not None, f"{text!r} is no condition that has words"
                operator = extreme[1]
        return cls(text, guard, left, operator, right)

    @property
    def axis(self) -> str:
        """The size that an error names."""
        return names_in(self.left)[0]

    @property
    def divisors(self) -> tuple[str, ...]:
        """The sizes that the condition divides by; none of them may be 0."""
        return (self.right,) if self.operator == "%" and self.right.isidentifier() else ()

    def expected(self, shown: Callable[[str], str], value: Callable[[str], str]) -> str:
        """Return what must hold, as the text of an f-string.

        `shown` renders a size with its value, and `value` the value of an expression.
        """
        left, right = self.left, self.right
        limit = shown(right) if right.isidentifier() else right
        words = {
            "%": f"{left} = {value(left)} to be a multiple of {limit}",
            "in": f"{left} of {_either(right)}",
            ">=": f"{left} of at least {limit}",
            "<=": f"{left} = {value(left)} of at most {limit}, as far as the kernel counts",
        }
        of = " and ".join(map(shown, names_in(right)))
        told = words.get(self.operator) or f"{left} = {value(right)}, the {self.operator} of {of}"
        return f"{told}, for {shown(self.guard)}" if self.guard else told

    @property
    def sentence(self) -> str:
        """What must hold, as a sentence for documentation."""
        words = {
            "%": f"a multiple of {self.right}",
            "in": _either(self.right),
            ">=": f"at least {self.right}",
            "<=": f"at most {self.right}",
        }
        of = " and ".join(names_in(self.right))
        told = f"{self.left} is {words.get(self.operator) or f'the {self.operator} of {of}'}"
        return f"{told}, unless {self.guard} is 0." if self.guard else f"{told}."


def _either(numbers: str) -> str:
    return " or ".join(re.findall(r"\d+", numbers))
