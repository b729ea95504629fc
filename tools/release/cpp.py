"""The parts of C++ that bindings need: comments, conditionals, macros, and declarations.

The time is linear in the text, whatever it holds. `BuildError` says what cannot be read.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from fi_ffi.errors import BuildError
from tools.release.conditions import IsSwitch, truth

# An end that is missing is the end of the text, or of the line: looked for again from each next
# beginning, it would take quadratic time.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*(?P<end>"?)' + r"|'(?:\\.|[^'\\\n]){,10}'")
_CONTINUED = re.compile(r"\\\r?\n")
_DIRECTIVE = re.compile(r"\s*#\s*(\w+)\s*(.*)")
_MACRO = re.compile(r"(\w+)(?!\()(?:\s+(.*))?$")
_INCLUDE = re.compile(r'["<]([^">]+)[">]')
# Included files generated for a module, which count as part of its source.
_PART = ".inc"
_MOST_NESTED = 50  # such files within each other
_MOST = 1 << 22  # characters of such files together
_MOST_PASSES = 8  # over a text, to replace macros that other macros have brought
# Marks in the text: between them, it is unknown whether the compiler sees the code.
DOUBT, SURE = "\x01", "\x02"
_LINE = "\x03"  # the end of a line of the source that is none of the text's

Include = Callable[[str], "str | None"]


def without_comments(text: str) -> str:
    return _COMMENT.sub(" ", text)


def _with_lines(comment: re.Match[str]) -> str:
    return " " + _LINE * comment[0].count("\n")


@dataclass(frozen=True)
class _Conditional:
    """An open `#if`: whether its branch is compiled, None if unknown, and whether one was."""

    branch: bool | None
    taken: bool | None
    outer: bool | None

    @property
    def seen(self) -> bool | None:
        """Whether the compiler sees the branch's lines; None if unknown."""
        both = (self.outer, self.branch)
        return False if False in both else None if None in both else True


@dataclass
class _Preprocessor:
    """Collects the lines that the compiler sees, and the object-like macros they define."""

    macros: dict[str, str]
    include: Include
    is_switch: IsSwitch
    headers: dict[str, None] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    open: list[_Conditional] = field(default_factory=list)
    depth: int = 0
    length: int = 0
    is_placed: bool = False  # whether the error that is raised has its place

    def run(self, text: str, file: str = "") -> None:
        self.length += len(text) if self.depth else 0
        if self.depth > _MOST_NESTED or self.length > _MOST:
            raise BuildError(
                f"{_PART} files nest more than {_MOST_NESTED} deep, or have more than {_MOST} "
                "characters"
            )
        number = 0
        for marked in _CONTINUED.sub(f" {_LINE}", _COMMENT.sub(_with_lines, text)).split("\n"):
            number += 1 + marked.count(_LINE)
            line = marked.replace(_LINE, "")
            directive = _DIRECTIVE.match(line)
            if directive is not None:
                try:
                    self.directive(directive[1], directive[2].strip())
                except BuildError as error:
                    if self.is_placed:
                        raise
                    self.is_placed = True
                    place = f"{file}line {number}, #{directive[1]}"
                    raise BuildError(f"{place}: {error}") from error
            elif self.seen is not False:
                self.lines.append(line)

    @property
    def seen(self) -> bool | None:
        """Whether the compiler sees this line; None if unknown."""
        return self.open[-1].seen if self.open else True

    def directive(self, name: str, rest: str) -> None:
        before = self.seen
        if name in ("if", "ifdef", "ifndef"):
            expression = {"ifdef": f"defined({rest})", "ifndef": f"!defined({rest})"}.get(
                name, rest
            )
            found = truth(expression, self.macros, self.is_switch)
            self.open.append(_Conditional(found, found, before))
        elif name in ("elif", "else", "endif"):
            if not self.open:
                raise BuildError("no conditional is open")
            last = self.open.pop()
            if name != "endif":
                self.open.append(self.following(last, name, rest))
        elif before is not False:
            self.content(name, rest)
        if self.seen is not before:
            self.lines.append(DOUBT if self.seen is None else SURE)

    def following(self, last: _Conditional, name: str, rest: str) -> _Conditional:
        """Return the branch that an `#elif` or `#else` opens."""
        found = truth(rest, self.macros, self.is_switch) if name == "elif" else True
        if last.taken is not False:
            found = False if last.taken or found is False else None
        is_unknown = None in (last.taken, found)
        taken = True if last.taken or found else None if is_unknown else False
        return _Conditional(found, taken, last.outer)

    def content(self, name: str, rest: str) -> None:
        macro = _MACRO.match(rest)
        if name == "define" and macro is not None:
            self.macros[macro[1]] = (macro[2] or "").strip()
        elif name == "undef":
            self.macros.pop(rest, None)
        elif name == "include" and (file := _INCLUDE.match(rest)):
            text = self.include(file[1]) if file[1].endswith(_PART) else None
            if text is not None:
                self.depth += 1
                self.run(text, f"{file[1]}, ")
                self.depth -= 1
            else:
                self.headers[file[1]] = None


@dataclass(frozen=True)
class Seen:
    """A preprocessed text, its object-like macros at the end, and the headers it includes.

    The headers are not read. `DOUBT` and `SURE` enclose code that depends on an unknown macro.
    """

    text: str
    macros: dict[str, str]
    headers: tuple[str, ...]


def preprocess(
    text: str, defines: Mapping[str, str], include: Include, is_switch: IsSwitch
) -> Seen:
    """Preprocess a text; `defines` are macros set by the command line and the compiler itself."""
    found = _Preprocessor(dict(defines), include, is_switch)
    found.run(text)
    return Seen("\n".join(found.lines), found.macros, tuple(found.headers))


_NAME = re.compile(r"\b[A-Za-z_]\w*")


def expand(text: str, macros: Mapping[str, str], most: int) -> str:
    """Return the text with its macros replaced, none of them within its own replacement.

    Raises `BuildError` if they stand for more than `most` characters.
    """
    done: set[str] = set()
    for _ in range(_MOST_PASSES):
        found = _NAME.findall(text)
        values = {name: macros[name] for name in {*found} - done if name in macros}
        if not values:
            break
        if sum(len(values[name]) for name in found if name in values) > most:
            raise BuildError("its macros stand for too many characters")
        text = _replaced(text, values)
        done |= values.keys()
    return text


def _replaced(text: str, values: Mapping[str, str]) -> str:
    return _NAME.sub(lambda match: values.get(match[0], match[0]), text)


@dataclass(frozen=True)
class Statement:
    """A declaration in a namespace, without its body; `body` is None if there is none."""

    text: str
    body: str | None = None

    @property
    def is_sure(self) -> bool:
        return DOUBT not in self.text


def _emptied(match: re.Match[str]) -> str:
    """Return a literal without its content; what begins as one and does not end stays."""
    return match[0] if match["end"] == "" else '""'


def statements(text: str) -> Iterator[Statement]:
    """Yield the declarations of all namespaces in a text."""
    text, doubt = _STRING.sub(_emptied, text), False
    start = position = 0
    # Where the declaration begins whose first parenthesis has been looked at.
    looked_at = -1
    while match := _ENDING.search(text, position):
        position, char = match.start(), match[0]
        if char == DOUBT:
            doubt = True
        elif char == SURE:
            doubt = False
        elif char in ";}":
            yield _statement(text[start:position], None, doubt)
            start = position + 1
        elif char == "{":
            head = text[start:position]
            if _opens_scope(head):
                start = position + 1
            else:
                end = closing(text, position)
                yield _statement(head, text[position : end + 1], doubt)
                position, start = end, end + 1
        elif char == "(":
            is_first, looked_at = looked_at != start, start
            position = closing(text, position)
            if is_first and _is_macro_call(text, start, position + 1):
                yield _statement(text[start : position + 1], None, doubt)
                start = position + 1
        position += 1


# Characters that may end a declaration.
_ENDING = re.compile("[;{}(\x01\x02]")
_NAMESPACE = re.compile(r"\bnamespace\b")
_EXTERN = re.compile(r'\bextern\s*""\s*$')
_AFTER_NAMESPACE = f"{string.ascii_letters}{string.digits}_:{string.whitespace}{DOUBT}{SURE}"


def _opens_scope(head: str) -> bool:
    """Return whether the text before a brace opens a namespace."""
    # The characters before them may be any, so a pattern with `$` would take quadratic time.
    last = head[len(head.rstrip(_AFTER_NAMESPACE)) :]
    return bool(_NAMESPACE.search(last) or _EXTERN.search(head))


# A macro call needs no semicolon.
_is_macro_call = re.compile(r"\s*[A-Z][A-Z0-9_]+\s*\(", re.ASCII).match


def _statement(text: str, body: str | None, doubt: bool) -> Statement:
    mark = DOUBT if doubt or DOUBT in text else ""
    clean = " ".join(text.replace(DOUBT, " ").replace(SURE, " ").split())
    return Statement(mark + clean, body)


_BRACKETS = {
    opening: (re.compile(f"[{re.escape(opening + close)}]"), close)
    for opening, close in ("()", "{}", "[]")
}


def closing(text: str, start: int) -> int:
    """Return the position that closes the bracket at `start`; the end if it is not closed."""
    pattern, close = _BRACKETS[text[start]]
    depth = 0
    for match in pattern.finditer(text, start):
        depth += -1 if match[0] == close else 1
        if not depth:
            return match.start()
    return len(text) - 1


_SEPARATOR = re.compile(r"[<(\[{>)\]},]")


def split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for match in _SEPARATOR.finditer(text):
        char = match[0]
        depth += (char in "<([{") - (char in ">)]}")
        if char == "," and not depth:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
