"""How the names of kernel modules are built.

    row = family_row("batch_prefill", "0.6.13")
    row.render(row.complete({"dtype_q": "bf16", "head_dim_qk": 128, "backend": "fa3"}))

FlashInfer builds a module's name from its family and all parameters that it was compiled for, and
releases differ in how. `data/names.json` has a row for each family and range of releases: a
template whose parameters are named as in FlashInfer's generator, and the parameters' kinds.
`fi_ffi.module_names` parses names by the same rows. docs/catalogue.md describes pitfalls and the
changes between releases.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from fi_ffi.errors import ArgumentError

Value = str | int | bool | None
Params = Mapping[str, Value]

# FlashInfer's short names -> the names in torch and in `fi_ffi.abi.tensor`.
DTYPES = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "i8": "int8",
    "u8": "uint8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    # Two values in a byte. FlashInfer has used two names for it, besides "u8": see
    # docs/catalogue.md.
    "fp4_e2m1": "float4_e2m1fn_x2",
    "fp4x2_e2m1": "float4_e2m1fn_x2",
}
# Alternative spellings of NVFP4 and of its storage type; the first that the release knows counts.
_ALSO = {
    "fp4": ("fp4x2_e2m1", "u8"),
    "u8": ("fp4x2_e2m1",),
    "uint8": ("fp4x2_e2m1",),
    "fp4_e2m1": ("fp4x2_e2m1",),
}


@dataclass(frozen=True)
class Words:
    """A parameter with a fixed set of values, each with its text in a name."""

    words: Mapping[Value, str]

    @property
    def expected(self) -> str:
        return " or ".join(str(value) for value in self.words)

    @property
    def is_dtype(self) -> bool:
        return all(value is None or value in DTYPES for value in self.words)

    def text(self, value: Value) -> str:
        """Return the text of a value, or of a dtype's long name; ValueError if it is invalid."""
        for known, text in self.words.items():
            is_long = self.is_dtype and known is not None and DTYPES[str(known)] == value
            # Types must match too: 1 and True are equal keys of a dictionary.
            if is_long or (known == value and type(known) is type(value)):
                return text
        also = _ALSO.get(value, ()) if isinstance(value, str) else ()
        for other in also:
            if other in self.words:
                return self.words[other]
        raise ValueError(value)

    def value(self, text: str) -> Value:
        return next(value for value, known in self.words.items() if known == text)


@dataclass(frozen=True)
class Number:
    """An integer of at least `low`, without leading zeros; after `before`, 0 is written as ""."""

    low: int
    before: str = ""
    is_dtype = False

    @property
    def expected(self) -> str:
        return f"{'0 or ' if self.before else ''}an integer of at least {self.low}"

    def text(self, value: Value) -> str:
        if type(value) is int and value == 0 and self.before:
            return ""
        if type(value) is not int or not self.low <= value < 10**9:
            raise ValueError(value)
        return f"{self.before}{value}"

    def value(self, text: str) -> Value:
        return int(text.removeprefix(self.before) or 0)


Kind = Words | Number


@functools.lru_cache(maxsize=64)
def version_of(release: str) -> Version:
    """Parse a release for comparisons; a local part after `+` is ignored."""
    try:
        return Version(Version(release).public)
    except InvalidVersion as error:
        expected = "a version such as 0.6.13"
        raise ArgumentError("uri", "release", got=repr(release), expected=expected) from error


@dataclass(frozen=True, eq=False)
class Row:
    """The naming rule of a family's modules, from release `since` to before `until`.

    In `template`, `{dtype_q:dtype}` is a parameter and its kind. `generator` is "module:function"
    inside FlashInfer and may contain parameters' texts; None if a module can only come from
    FlashInfer's own list. `arguments` are those of the generator that the name does not contain.
    """

    family: str
    template: str
    generator: str | None = None
    since: str = ""
    until: str = ""
    defaults: Params = field(default_factory=dict)
    arguments: Params = field(default_factory=dict)

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """Pairs of literal text and the parameter that follows it."""
        parsed = string.Formatter().parse(self.template)
        return tuple((literal, name) for literal, name, _kind, _ in parsed)

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """The parameters' kinds, in the order of the name."""
        parsed = string.Formatter().parse(self.template)
        return {name: KINDS[kind or ""] for _, name, kind, _ in parsed if name is not None}

    def holds_for(self, release: str) -> bool:
        found = version_of(release)
        return not (self.since and found < version_of(self.since)) and not (
            self.until and found >= version_of(self.until)
        )

    def complete(self, given: Params) -> dict[str, Value]:
        """Check `given`, add defaults, and return all parameters in the order of the name."""
        unknown = [name for name in given if name not in self.kinds]
        if unknown:
            raise self.error(unknown[0], "a parameter", ", ".join(self.kinds) or "none")
        values = {name: self._read(name, value) for name, value in given.items()}
        # Defaults derived from other parameters come last.
        for name in sorted(self.kinds, key=self._follows):
            if name not in values:
                values[name] = self._read(name, self.default(name, values))
        return {name: values[name] for name in self.kinds}

    def _follows(self, name: str) -> bool:
        return name in _DERIVED or str(self.defaults.get(name)).startswith("=")

    def default(self, name: str, params: Params) -> Value:
        """Return a parameter's default beside these others; None if it has to be given."""
        if name in _DERIVED and name not in self.defaults:
            return _DERIVED[name](params)
        default = self.defaults.get(name)
        if isinstance(default, str) and default.startswith("="):
            return params.get(default[1:])
        return default

    def render(self, params: Params) -> str:
        """Return the name for complete parameters."""
        texts = (
            literal + ("" if name is None else self.text(name, params[name]))
            for literal, name in self.parts
        )
        return "".join(texts)

    def _read(self, name: str, value: Value) -> Value:
        """Return the value that the name's text stands for, for any accepted spelling."""
        return self.kinds[name].value(self.text(name, value))

    def text(self, name: str, value: Value) -> str:
        """Return the text that a parameter's value has in the name."""
        kind = self.kinds[name]
        try:
            return kind.text(value)
        except (ValueError, TypeError) as error:
            got = "nothing" if value is None else repr(value)
            raise self.error(name, got, kind.expected) from error

    def error(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(f"uri of {self.family}", argument, got=got, expected=expected)


# Defaults derived from other parameters.
_DERIVED: dict[str, Callable[[Params], Value]] = {
    # The query's dtype; for an fp8 query there is no default, since f16 and bf16 are both common.
    "dtype_o": lambda p: p.get("dtype_q") if p.get("dtype_q") in ("f16", "bf16") else None,
    # The mode that FlashInfer builds ahead of time; fa3 has one module for all strides.
    "paged_kv_stride_mode": lambda p: "equal" if p.get("backend") != "fa3" else "runtime",
    "use_spec_dec": lambda p: p.get("q_seq_len") != 1,
}


def _kind(data: Any) -> Kind:
    if isinstance(data, dict):
        return Number(**data)
    pairs = [(entry, entry) if isinstance(entry, str) else entry for entry in data]
    return Words(dict(pairs))


def _row(data: dict[str, Any]) -> Row:
    """Return a row from its JSON; without a template it has no parameters."""
    template = data.get("template", data["family"])
    for name, text in _DATA["pieces"].items():
        template = template.replace(f"<{name}>", text)
    defaults = _DATA["defaults"] | data.get("defaults", {})
    return Row(**data | {"template": template, "defaults": defaults})


def _split(row: Row) -> Iterator[Row]:
    """Split a row where its kinds took other values in other releases."""
    for name, spans in _DATA["kinds_by_release"].items():
        if f":{name}}}" in row.template:
            for since, until, kind in spans:
                since = max(row.since, since, key=lambda text: version_of(text or "0"))
                until = min(row.until, until, key=lambda text: version_of(text or "9999"))
                if not (since and until) or version_of(since) < version_of(until):
                    template = row.template.replace(f":{name}}}", f":{kind}}}")
                    yield replace(row, template=template, since=since, until=until)
            return
    yield row


_DATA = json.loads((Path(__file__).with_name("data") / "names.json").read_text())
KINDS: dict[str, Kind] = {name: _kind(data) for name, data in _DATA["kinds"].items()}
ROWS: tuple[Row, ...] = tuple(row for data in _DATA["rows"] for row in _split(_row(data)))


def span(rows: Iterable[Row]) -> str:
    """Return the releases that rows cover, as text."""
    rows = tuple(rows)
    since = min((row.since for row in rows), key=lambda text: version_of(text or "0"))
    until = max((row.until for row in rows), key=lambda text: version_of(text or "9999"))
    words = [f"from {since}" if since else "", f"before {until}" if until else ""]
    return " and ".join(filter(None, words)) or "every release"


def family_row(family: str, release: str) -> Row:
    """Return the row of a family in a release.

    Raises ArgumentError if FlashInfer never had the family, or does not have it in this release.
    """
    rows = [row for row in ROWS if row.family == family]
    for row in rows:
        if row.holds_for(release):
            return row
    if rows:
        expected = f"a release {span(rows)}"
        raise ArgumentError(f"uri of {family}", "release", got=release, expected=expected)
    families = sorted({row.family for row in ROWS})
    close = get_close_matches(family, families, n=3)
    expected = " or ".join(close) if close else f"one of {', '.join(families)}"
    raise ArgumentError("uri", "family", got=repr(family), expected=expected)
