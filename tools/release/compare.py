"""The differences between the declarations of two FlashInfer releases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from fi_ffi.loader.uris import ROWS, Row
from tools.release.exports import Function
from tools.release.generators import Generator
from tools.release.interface import Interface, Key

ADDED, REMOVED, RETYPED, RENAMED = "added", "removed", "retyped", "renamed"
RESULT = "result"


@dataclass(frozen=True)
class Change:
    """A changed parameter; positions count from 0 and are None if it does not exist.

    `before` and `after` are "name: type", or the types of the result.
    """

    kind: str
    old: int | None
    new: int | None
    before: str
    after: str

    def __str__(self) -> str:
        if self.kind == ADDED:
            return f"+{self.new} {self.after}"
        if self.kind == REMOVED:
            return f"-{self.old} {self.before}"
        where = "->" if self.kind == RESULT else str(self.new)
        place = where if self.old in (None, self.new) else f"{self.old}>{self.new}"
        return f"{self.kind} {place} {self.before} => {self.after}"


def changes(old: Function, new: Function) -> list[Change]:
    """Return how a function's parameters and result changed, by position."""
    found = list(_of_parameters(old, new))
    if old.signature.result != new.signature.result:
        found.append(Change(RESULT, None, None, old.signature.result, new.signature.result))
    return found


def _of_parameters(old: Function, new: Function) -> Iterator[Change]:
    a, b = _named(old), _named(new)
    for tag, i, i_end, j, j_end in SequenceMatcher(None, *_keys(a, b), False).get_opcodes():
        pairs = list(zip(range(i, i_end), range(j, j_end), strict=False))
        # With as many parameters as before, those that kept their type were renamed.
        is_in_place = tag == "equal" or (tag == "replace" and i_end - i == j_end - j)
        for x, y in pairs if is_in_place else ():
            (name, kind), (new_name, new_kind) = a[x], b[y]
            before, after = f"{name}: {kind}", f"{new_name}: {new_kind}"
            if name != new_name and kind != new_kind:
                yield Change(REMOVED, x, None, before, "")
                yield Change(ADDED, None, y, "", after)
            elif name != new_name:
                yield Change(RENAMED, x, y, before, after)
            elif kind != new_kind:
                yield Change(RETYPED, x, y, before, after)
        if not is_in_place:
            yield from (Change(REMOVED, x, None, ": ".join(a[x]), "") for x in range(i, i_end))
            yield from (Change(ADDED, None, y, "", ": ".join(b[y])) for y in range(j, j_end))


_Parameters = list[tuple[str, str]]


def _named(function: Function) -> _Parameters:
    return list(zip(function.names, function.signature.params, strict=True))


def _keys(a: _Parameters, b: _Parameters) -> tuple[list[str], list[str]]:
    """Return the keys for matching: names, or types if a declaration omits names."""
    by_name = all(name for name, _ in (*a, *b))
    return [name if by_name else kind for name, kind in a], [
        name if by_name else kind for name, kind in b
    ]


@dataclass(frozen=True)
class Moved:
    """An export that moved to another source or variant."""

    old: Key
    new: Key
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Family:
    """A family whose module names or generator changed: the template, and the generator.

    "" means that a release lacks it, or that it is not recorded.
    """

    family: str
    old_name: str
    new_name: str
    old_generator: str
    new_generator: str
    note: str


@dataclass(frozen=True)
class Difference:
    """All changes from `old` to `new`, in the order of sources and names."""

    old: Interface
    new: Interface
    gone: tuple[Key, ...]
    came: tuple[Key, ...]
    moved: tuple[Moved, ...]
    changed: Mapping[Key, tuple[Change, ...]]
    # Exports of several generated sources with one name pattern, of which some changed.
    several: tuple[Key, ...]
    families: tuple[Family, ...]
    generators_gone: Mapping[str, Generator]
    generators_came: Mapping[str, Generator]
    generators_changed: Mapping[str, tuple[Generator, Generator]]

    @property
    def common(self) -> int:
        return len({*self.old.exports} & {*self.new.exports})


def compare(old: Interface, new: Interface) -> Difference:
    """Compare two releases."""
    before, after = {*old.exports, *old.unread}, {*new.exports, *new.unread}
    gone, came = sorted(before - after), sorted(after - before)
    moved = list(_moved(old, new, gone, came))
    gone = [key for key in gone if key not in {each.old for each in moved}]
    came = [key for key in came if key not in {each.new for each in moved}]
    changed, several = {}, []
    for key in sorted({*old.exports} & {*new.exports}):
        first, second = old.exports[key], new.exports[key]
        if len(first) == len(second) == 1:
            if found := changes(first[0], second[0]):
                changed[key] = tuple(found)
        elif {*first} != {*second}:
            several.append(key)
    a, b = old.generators, new.generators
    return Difference(
        old, new, tuple(gone), tuple(came), tuple(moved), changed, tuple(several),
        tuple(_families(old, new)),
        {name: a[name] for name in a if name not in b},
        {name: b[name] for name in b if name not in a},
        {name: (a[name], b[name]) for name in a if name in b and a[name] != b[name]},
    )  # fmt: skip


def _moved(old: Interface, new: Interface, gone: list[Key], came: list[Key]) -> Iterator[Moved]:
    """Yield exports that went and came under a unique name."""
    for key in gone:
        same = [other for other in came if other.name == key.name]
        if len(same) == sum(other.name == key.name for other in gone) == 1:
            first, second = old.exports.get(key, ()), new.exports.get(same[0], ())
            if len(first) == len(second) == 1:
                yield Moved(key, same[0], tuple(changes(first[0], second[0])))


def _families(old: Interface, new: Interface) -> Iterator[Family]:
    """Yield the families whose names or generators differ, or that one of the releases lacks."""
    for family in sorted({row.family for row in ROWS}):
        before, after = _row_of(family, old.release), _row_of(family, new.release)
        names = before.template if before else "", after.template if after else ""
        made = _generator(before), _generator(after)
        was_there = not made[0] or _exists(made[0], old)
        is_lost = bool(made[1]) and was_there and not _exists(made[1], new)
        if names[0] != names[1] or made[0] != made[1] or is_lost:
            note = f"{new.release} has no {made[1]}" if is_lost else ""
            yield Family(family, *names, *made, note)


def family_of(generator: str) -> str:
    """Return the family whose modules a generator makes or names, or ""."""
    function = generator.partition(":")[2].lstrip("_")
    for row in ROWS:
        maker = (row.generator or "").partition(":")[2].lstrip("_")
        what = maker.removeprefix("gen_").removesuffix("_module")
        if function in (maker, f"get_{what}_uri", f"get_{row.family}_uri"):
            return row.family
    return ""


def _row_of(family: str, release: str) -> Row | None:
    found = (row for row in ROWS if row.family == family and row.holds_for(release))
    return next(found, None)


def _generator(row: Row | None) -> str:
    return (row.generator or "") if row else ""


def _exists(generator: str, interface: Interface) -> bool:
    """Return whether the sources have a generator; a parameterised name is assumed to exist."""
    module, _, function = generator.partition(":")
    if "{" in function or "{" in module:
        return True
    made = (name.split(":") for name in interface.generators)
    return any(f"{of}.".startswith(f"{module}.") and name == function for of, name in made)
