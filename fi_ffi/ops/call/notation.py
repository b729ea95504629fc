"""The notation of rows: axes such as "b+1" or "2*h/128", conditions such as "d >= top_k".

Conditions are Python expressions. The check, the words of its error and its documentation are
derived from the expression.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """A size as a sum of named sizes with factors and a number, divided by `over`."""

    terms: tuple[tuple[str, int], ...]
    more: int
    over: int
    names: tuple[str, ...]

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
    return Axis(tuple(terms.items()), more, int(over or 1), tuple(terms))


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
def parse_expression(text: str) -> tuple[str, tuple[str, ...]]:
    """Return an expression as a template for `format_map`, and the names in it, in order."""
    names: dict[str, None] = {}

    def braced(match: re.Match[str]) -> str:
        name = match[1]
        if name is None or name in _WORDS:
            return match[0]
        names[name] = None
        return f"{{{name}}}"

    return _NAME.sub(braced, text), tuple(names)


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
    axis: str  # the size that an error names
    # The text with its `names` in braces.
    template: str
    names: tuple[str, ...]

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
        template, names = parse_expression(text)
        if operator == "%" and right in names:  # a multiple of 0 is refused
            template = f"{{{right}}} and {template}"
        axis = parse_expression(left)[1][0]
        return cls(text, guard, left, operator, right, axis, template, names)

    def expected(self, sizes: Mapping[str, int], planned: Collection[str] = ()) -> str:
        """Return what must hold, for an error; a plan has fixed the `planned` sizes."""

        def shown(axis: str) -> str:
            size = sizes[axis]
            return f"{size}, as planned" if axis in planned else f"{axis} = {size}"

        # The value of an expression: that of the extreme, if the size must be one.
        side = self.right if self.operator in ("max", "min") else self.left
        value = eval(side, {**FUNCTIONS}, {**sizes})
        told = {
            "%": "{} = {} to be {}",
            "in": "{0} of {2}",
            ">=": "{0} of {2}",
            "<=": "{} = {} of {}, as far as the kernel counts",
        }.get(self.operator, "{} = {}, {}")
        told = told.format(self.left, value, self._limit(shown))
        return f"{told}, for {shown(self.guard)}" if self.guard else told

    @property
    def sentence(self) -> str:
        """What must hold, as a sentence for documentation."""
        unless = f", unless {self.guard} is 0" if self.guard else ""
        return f"{self.left} is {self._limit(str)}{unless}."

    def _limit(self, shown: Callable[[str], str]) -> str:
        """Say what the left side must be; `shown` renders a size."""
        names = parse_expression(self.right)[1]
        limit = shown(self.right) if self.right in names else self.right
        words = {
            "%": f"a multiple of {limit}",
            "in": " or ".join(re.findall(r"\d+", self.right)),
            ">=": f"at least {limit}",
            "<=": f"at most {limit}",
        }
        return (
            words.get(self.operator) or f"the {self.operator} of {' and '.join(map(shown, names))}"
        )
