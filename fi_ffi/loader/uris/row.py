"""A row of the table of module names: a family's template for a range of releases."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

from fi_ffi.errors import ArgumentError
from fi_ffi.loader.uris.kinds import KINDS, Kind, Value

Params = Mapping[str, Value]
Default = Value | Callable[[Params], Value]


@functools.lru_cache(maxsize=64)
def version_of(release: str) -> Version:
    """A release as something to compare; what follows a `+` does not matter."""
    try:
        return Version(Version(release).public)
    except InvalidVersion as error:
        expected = "a version such as 0.6.13"
        raise ArgumentError("uri", "release", got=repr(release), expected=expected) from error


@dataclass(frozen=True, eq=False)
class Row:
    """How the modules of a family are called, from release `since` to before `until`.

    In `template`, `{dtype_q:dtype}` is a parameter and its kind (a key of KINDS).
    Parameters have the names that FlashInfer's generator has for them.  `generator`
    is "module:function", and may use texts of parameters; None where FlashInfer's own
    list of modules is the only way to it.  `arguments` are those of the generator that
    the name says nothing of.  `refusal` says what is wrong with a combination.
    """

    family: str
    template: str
    generator: str | None = None
    since: str = ""
    until: str = ""
    defaults: Mapping[str, Default] = field(default_factory=dict)
    arguments: Mapping[str, Value] = field(default_factory=dict)
    refusal: Callable[[Params], str | None] = lambda params: None

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """Literal text and the parameter after it."""
        parsed = string.Formatter().parse(self.template)
        return tuple((literal, name) for literal, name, _kind, _ in parsed)

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """The parameters, in the order of the name."""
        parsed = string.Formatter().parse(self.template)
        return {name: KINDS[kind or ""] for _, name, kind, _ in parsed if name is not None}

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        pieces = []
        for literal, name in self.parts:
            pieces.append(re.escape(literal))
            if name is not None:
                pieces.append(f"(?P<{name}>{self.kinds[name].pattern})")
        return re.compile("".join(pieces))

    def holds_for(self, release: str) -> bool:
        found = version_of(release)
        return not (self.since and found < version_of(self.since)) and not (
            self.until and found >= version_of(self.until)
        )

    def match(self, name: str) -> dict[str, Value] | None:
        """The parameters in a name, if it is one of this row's."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        params = {key: self.kinds[key].value(text) for key, text in found.groupdict().items()}
        return None if self.refusal(params) else params

    def complete(self, given: Params) -> dict[str, Value]:
        """`given` checked, with the defaults of those left out, in the order of the name."""
        unknown = [name for name in given if name not in self.kinds]
        if unknown:
            raise self._error(unknown[0], "a parameter", ", ".join(self.kinds) or "none")
        values = {name: self._read(name, value) for name, value in given.items()}
        # Defaults that follow from other parameters come after those that do not.
        for name in sorted(self.kinds, key=lambda name: callable(self.defaults.get(name))):
            if name not in values:
                values[name] = self._read(name, self.default(name, values))
        result = {name: values[name] for name in self.kinds}
        reason = self.refusal(result)
        if reason is not None:
            raise self._error(", ".join(given), "this combination", reason)
        return result

    def default(self, name: str, params: Params) -> Value:
        """What a parameter is beside these others if nothing is said; None where it must be."""
        default = self.defaults.get(name)
        return default(params) if callable(default) else default

    def render(self, params: Params) -> str:
        """The name for complete parameters."""
        texts = (
            literal + ("" if name is None else self._text(name, params[name]))
            for literal, name in self.parts
        )
        return "".join(texts)

    def generator_for(self, params: Params) -> str | None:
        """What makes this module inside FlashInfer, as "module:function", if it is known."""
        if self.generator is None:
            return None
        texts = {name: self._text(name, params[name]) for name in self.kinds}
        return self.generator.format_map(texts)

    def _read(self, name: str, value: Value) -> Value:
        """The value as `match` would give it, whatever spelling it came in."""
        return self.kinds[name].value(self._text(name, value))

    def _text(self, name: str, value: Value) -> str:
        kind = self.kinds[name]
        try:
            return kind.text(value)
        except (ValueError, TypeError) as error:
            got = "nothing" if value is None else repr(value)
            raise self._error(name, got, kind.expected) from error

    def _error(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(f"uri of {self.family}", argument, got=got, expected=expected)


def span(rows: Iterable[Row]) -> str:
    """The releases that rows are for, in words."""
    rows = tuple(rows)
    since = min((row.since for row in rows), key=lambda text: version_of(text or "0"))
    until = max((row.until for row in rows), key=lambda text: version_of(text or "9999"))
    words = [f"from {since}" if since else "", f"before {until}" if until else ""]
    return " and ".join(filter(None, words)) or "every release"
