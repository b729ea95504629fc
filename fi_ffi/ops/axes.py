"""Axes as rows write them: "h", "128", "b+1", "2*h", "nope+rope", "2*h/128"."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A size as a sum: of named sizes, each so many times, and a number; divided by `over`."""

    terms: tuple[tuple[str, int], ...]
    more: int
    over: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size; all its names must be known."""
        return (sum(sizes[name] * times for name, times in self.terms) + self.more) // self.over

    def unknown(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """The terms that are not known."""
        return tuple(term for term in self.terms if term[0] not in sizes)

    def solve(self, size: int, sizes: Mapping[str, int]) -> int | None:
        """What the one unknown name must be for this size; None where nothing will do."""
        ((name, times),) = self.unknown(sizes)
        rest = size * self.over - self.size({**sizes, name: 0})
        return None if rest < 0 or rest % times else rest // times


@functools.cache
def parse_axis(text: str) -> Axis:
    """Read one axis of a row."""
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


def axis_size(text: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis whose names are all known."""
    return parse_axis(text).size(sizes)
