"""The exported functions of a module's sources, and the methods of its objects."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fi_ffi.abi.signature import Signature
from fi_ffi.errors import BuildError
from tools.release import cpp
from tools.release.conditions import IsSwitch
from tools.release.types import abi_type

EXPORT = "TVM_FFI_DLL_EXPORT_TYPED_FUNC"
_EXPORT = re.compile(EXPORT + r"\s*\(\s*(\w+)\s*,\s*&?\s*([\w:]+)(?:<[^()]*>)?\s*\)\s*$")
_USING = re.compile(r"using\s+(\w+)\s*=\s*(.+)$")
_ENUM = re.compile(r"enum\s+(?:class\s+|struct\s+)?(\w+)\b")
# Words before a function's result that do not belong to it.
_SPECIFIERS = (
    r"(?:template\s*<[^<>]*>\s*)?"
    r"(?:(?:static|inline|extern|constexpr|virtual|__host__|TVM_FFI_INLINE)\s+|\"\"\s*)*"
)
_FUNCTION = re.compile(_SPECIFIERS + r"(?P<result>[\w:]+(?:\s*<.*>)?[\s&]+)(?P<name>[\w:]+)\s*\(")
_CLASS = re.compile(r"(?:class|struct)\s+(\w+)\s*(?:final\s*)?:(?!:)")
_BASE = re.compile(r"\bModuleObj\b")
_MOST = 1 << 20  # characters that the macros of all parameter lists of a source stand for
# FlashInfer's spelling of macros inside parameter lists.
_MACRO = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")
_METHOD = re.compile(r'name\s*==\s*"(\w+)"')
_LAMBDA = re.compile(r"\bFromTyped\(\s*(?=\[)")


@dataclass(frozen=True)
class Function:
    """An exported function or a method: its signature and its parameters' names."""

    signature: Signature
    names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A source file of a module, and the macros that the compiler is given for it."""

    path: str
    text: str
    defines: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Bindings:
    """The exports of a module's sources, by name; `objects` has methods by class and name.

    `unread` maps an exported name to the reason why its function is unknown.
    """

    exports: dict[str, Function] = field(default_factory=dict)
    objects: dict[str, dict[str, Function]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


# (path of the source, included name) -> the included text, or None.
Include = Callable[[str, str], "str | None"]


def read(
    sources: Iterable[Source],
    include: Include = lambda path, name: None,
    is_switch: IsSwitch = lambda name: False,
    is_lenient: bool = False,
) -> Bindings:
    """Return the exports of all sources together.

    `is_switch` returns whether a macro can only be set on the command line. `BuildError` names what
    is unknown: an export without a declaration, an unknown type, or a condition on an unknown
    macro. With `is_lenient`, such an export is listed in `unread` instead.
    """
    found = Bindings()
    for source in sources:
        if EXPORT in source.text:
            try:
                _Reader(source, include, is_switch).add(found, is_lenient)
            except BuildError as error:
                raise BuildError(f"{source.path}: {error}") from error
    return found


class _Reader:
    """One source, and as many of its headers as needed."""

    def __init__(self, source: Source, include: Include, is_switch: IsSwitch) -> None:
        self.include = functools.partial(include, source.path)
        self.is_switch = is_switch
        seen = cpp.preprocess(source.text, source.defines, self.include, is_switch)
        self.text, self.macros, self.headers = seen.text, seen.macros, seen.headers
        self.scope = list(cpp.statements(self.text))
        self.known = _aliases(self.scope)
        self.declared = _functions(self.scope)
        self.left = _MOST

    def add(self, found: Bindings, is_lenient: bool) -> None:
        exports = [(match, s) for s in self.scope if (match := _EXPORT.search(s.text))]
        if len(exports) != self.text.count(EXPORT):
            raise BuildError(f"{self.text.count(EXPORT)} exports, of which {len(exports)} are read")
        for match, statement in exports:
            name = match[1]
            try:
                if not statement.is_sure:
                    raise BuildError(f"whether {name} is exported depends on an unknown macro")
                if name in found.exports:
                    raise BuildError(f"{name} is exported twice")
                found.exports[name] = self.exported(name, match[2].rpartition("::")[2])
            except BuildError as error:
                if not is_lenient:
                    raise
                found.unread[name] = str(error)
        found.objects |= {
            name: dict(_methods(text, name, self.known)) for name, text in self.classes().items()
        }

    def classes(self) -> dict[str, str]:
        """Return the text of each class of module objects, up to where the next one begins."""
        found = (_CLASS.search(statement.text) for statement in self.scope)
        names = {match[1] for match in found if match and _BASE.search(match.string, match.end())}
        places: dict[str, int] = {}
        for match in _CLASS.finditer(self.text):
            if match[1] in names:
                places.setdefault(match[1], match.start())
        ends = [*places.values(), len(self.text)][1:]
        return {
            name: self.text[start:end]
            for (name, start), end in zip(places.items(), ends, strict=True)
        }

    def exported(self, name: str, function: str) -> Function:
        """Return the function; all its declarations must agree."""
        declared = self.declared.get(function) or self.from_headers(function)
        if not declared:
            raise BuildError(f"{name} is exported and not declared")
        if not all(statement.is_sure for statement in declared):
            raise BuildError(f"how {name} is declared depends on an unknown macro")
        texts = dict.fromkeys(statement.text for statement in declared)
        functions = {self.declaration(name, text) for text in texts}
        if len({function.signature for function in functions}) > 1:
            raise BuildError(f"{name} is declared in several ways")
        # Prefer a definition, which may have names that a declaration omits.
        return max(functions, key=lambda one: (sum(map(bool, one.names)), one.names))

    def declaration(self, name: str, text: str) -> Function:
        match = _FUNCTION.match(text)
        assert match is not None
        start = match.end() - 1
        inside = text[start + 1 : cpp.closing(text, start)]
        self.define({*_MACRO.findall(inside)} - self.macros.keys())
        left, self.left = self.left, 0  # a macro that is too long is expanded once
        expanded = cpp.expand(inside, self.macros, left)
        self.left = left - len(expanded)
        return function_of(name, match["result"], expanded, self.known)

    def define(self, macros: set[str]) -> None:
        """Take these macros' values from the headers that define them."""
        for header in self.read_headers if macros else ():
            if not macros.isdisjoint(header.words):
                values = header.seen.macros
                self.macros |= {macro: values[macro] for macro in macros & values.keys()}

    def from_headers(self, function: str) -> list[cpp.Statement]:
        return [
            statement
            for header in self.read_headers
            if function in header.words
            for statement in header.functions.get(function, ())
        ]

    @functools.cached_property
    def read_headers(self) -> list[_Header]:
        texts = (self.include(header) for header in self.headers)
        macros = dict(self.macros)
        return [
            _Header(text, lambda text: cpp.preprocess(text, macros, self.include, self.is_switch))
            for text in texts
            if text is not None
        ]


class _Header:
    """An included file, each of whose parts is read once, when it is first needed."""

    def __init__(self, text: str, preprocess: Callable[[str], cpp.Seen]) -> None:
        self._text, self._preprocess = text, preprocess

    @functools.cached_property
    def words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self._text))

    @functools.cached_property
    def seen(self) -> cpp.Seen:
        return self._preprocess(self._text)

    @functools.cached_property
    def functions(self) -> dict[str, list[cpp.Statement]]:
        return _functions(cpp.statements(self.seen.text))


def _functions(scope: Iterable[cpp.Statement]) -> dict[str, list[cpp.Statement]]:
    """Return the declarations by name."""
    found: dict[str, list[cpp.Statement]] = {}
    for statement in scope:
        if function := _FUNCTION.match(statement.text.removeprefix(cpp.DOUBT)):
            found.setdefault(function["name"].rpartition("::")[2], []).append(statement)
    return found


def _aliases(scope: Iterable[cpp.Statement]) -> dict[str, str]:
    aliases = {}
    for statement in scope:
        if using := _USING.search(statement.text):
            aliases[using[1]] = using[2]
        elif statement.body and (enum := _ENUM.search(statement.text)):
            aliases[enum[1]] = "int"
    return aliases


def function_of(name: str, result: str, parameters: str, known: Mapping[str, str]) -> Function:
    """Return a function from the text of its result and of its parameters."""
    pairs = [_parameter(text) for text in cpp.split(parameters) if text != "void"]
    spelled = {type_: abi_type(type_, known) for type_ in dict.fromkeys(t for t, _ in pairs)}
    types = tuple(spelled[type_] for type_, _ in pairs)
    return Function(Signature(name, types, abi_type(result, known)), tuple(n for _, n in pairs))


_NAMED = re.compile(r"(.*[\s&>*])(\w+)")


def _parameter(text: str) -> tuple[str, str]:
    """Return a parameter's type and name; the name may be ""."""
    text = text.partition("=")[0].strip()
    text = re.sub(r"^\[\[.*?\]\]\s*", "", text)
    named = _NAMED.fullmatch(text)
    if named is None or named[1].strip() in ("const", "unsigned", "long"):
        return text, ""
    return named[1].strip(), named[2]


def _methods(
    text: str, class_name: str, known: Mapping[str, str]
) -> Iterator[tuple[str, Function]]:
    """Yield the methods that a class's `GetFunction` returns, by name."""
    asked = text.find("GetFunction(")
    start = text.find("{", asked)
    if min(asked, start) < 0:
        raise BuildError(f"the class {class_name} has no GetFunction")
    body = text[start : cpp.closing(text, start)]
    names = list(_METHOD.finditer(body))
    if not names:
        raise BuildError(f"no method of the class {class_name} can be read")
    ends = [*(match.start() for match in names[1:]), len(body)]
    for match, end in zip(names, ends, strict=True):
        part = body[match.end() : end]
        made = _LAMBDA.search(part)
        if made is None:
            raise BuildError(f"the function of the method {match[1]} cannot be found")
        yield match[1], _lambda(match[1], part[made.end() :], known)


_ARROW = re.compile(r"\s*(?:mutable\s*)?(?:->(?P<result>[\w:<>\s]+))?\{")


def _lambda(name: str, text: str, known: Mapping[str, str]) -> Function:
    """Parse `[this](int64_t id) -> int64_t { ... }`; without a result type it returns nothing."""
    end = cpp.closing(text, 0)
    opening = text.find("(", end)
    close = cpp.closing(text, opening) if opening >= 0 else len(text)
    arrow = _ARROW.match(text, close + 1)
    if arrow is None:
        raise BuildError(f"the parameters of the method {name} cannot be read")
    inner = text[arrow.end() : cpp.closing(text, arrow.end() - 1)]
    if arrow["result"] is None and re.search(r"\breturn\b\s*[^;\s]", inner):
        raise BuildError(f"the result of the method {name} cannot be read")
    return function_of(name, arrow["result"] or "void", text[opening + 1 : close], known)
