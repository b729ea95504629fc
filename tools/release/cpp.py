"""The parts of C++ that bindings need: comments, conditionals, macros, and declarations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from tools.release.conditions import IsSwitch, truth

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])*'")
_CONTINUED = re.compile(r"\\\r?\n")
_DIRECTIVE = re.compile(r"\s*#\s*(\w+)\s*(.*)")
_MACRO = re.compile(r"(\w+)(?!\()(?:\s+(.*))?$")
_INCLUDE = re.compile(r'["<]([^">]+)[">]')
# Included files generated for a module, which count as part of its source.
_PART = ".inc"
# Marks in the text: between them, it is unknown whether the compiler sees the code.
DOUBT, SURE = "\x01", "\x02"

Include = Callable[[str], "str | None"]


@dataclass
class _Preprocessor:
    """Collects the lines that the compiler sees, and the object-like macros they define."""

    macros: dict[str, str]
    include: Include
    is_switch: IsSwitch
    headers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    # For each open conditional: whether this branch is compiled, and whether an earlier one was.
    open: list[tuple[bool | None, bool | None]] = field(default_factory=list)

    def run(self, text: str) -> None:
        for line in _CONTINUED.sub(" ", _COMMENT.sub(" ", text)).split("\n"):
            directive = _DIRECTIVE.match(line)
            if directive is not None:
                self.directive(directive[1], directive[2].strip())
            elif self.seen is not False:
                self.lines.append(line)

    @property
    def seen(self) -> bool | None:
        """Whether the compiler sees this line; None if unknown."""
        seen = [branch for branch, _ in self.open]
        return False if False in seen else None if None in seen else True

    def directive(self, name: str, rest: str) -> None:
        before = self.seen
        if name in ("if", "ifdef", "ifndef"):
            expression = {"ifdef": f"defined({rest})", "ifndef": f"!defined({rest})"}.get(
                name, rest
            )
            found = truth(expression, self.macros, self.is_switch)
            self.open.append((found, found))
        elif name in ("elif", "else"):
            _, taken = self.open.pop()
            found = truth(rest, self.macros, self.is_switch) if name == "elif" else True
            if taken is not False:
                found = False if taken or found is False else None
            self.open.append((found, True if taken or found else None if None in (taken, found)
                              else False))  # fmt: skip
        elif name == "endif":
            self.open.pop()
        elif before is not False:
            self.content(name, rest)
        if self.seen is not before:
            self.lines.append(DOUBT if self.seen is None else SURE)

    def content(self, name: str, rest: str) -> None:
        macro = _MACRO.match(rest)
        if name == "define" and macro is not None:
            self.macros[macro[1]] = (macro[2] or "").strip()
        elif name == "undef":
            self.macros.pop(rest, None)
        elif name == "include" and (file := _INCLUDE.match(rest)):
            text = self.include(file[1]) if file[1].endswith(_PART) else None
            if text is not None:
                self.run(text)
            else:
                self.headers.append(file[1])


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


def expand(text: str, macros: Mapping[str, str]) -> str:
    """Return the text with its macros replaced."""
    names = [name for name in re.findall(r"\b[A-Za-z_]\w*", text) if name in macros]
    for name in dict.fromkeys(names):
        text = re.sub(rf"\b{name}\b", lambda _, name=name: macros[name], text)  # type: ignore[misc]
    return text


@dataclass(frozen=True)
class Statement:
    """A declaration in a namespace, without its body; `body` is None if there is none."""

    text: str
    body: str | None = None

    @property
    def is_sure(self) -> bool:
        return DOUBT not in self.text


def statements(text: str) -> Iterator[Statement]:
    """Yield the declarations of all namespaces in a text."""
    text, doubt = _STRING.sub('""', text), False
    start = position = 0
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
            if _SCOPE.search(head):
                start = position + 1
            else:
                end = closing(text, position)
                yield _statement(head, text[position : end + 1], doubt)
                position, start = end, end + 1
        elif char == "(":
            position = closing(text, position)
            if _is_macro_call(text[start : position + 1]):
                yield _statement(text[start : position + 1], None, doubt)
                start = position + 1
        position += 1


# Characters that may end a declaration, and the text that opens a namespace.
_ENDING = re.compile("[;{}(\x01\x02]")
_SCOPE = re.compile(r'\bnamespace\b[\w:\s\x01\x02]*$|\bextern\s*""\s*$')
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


def split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "<([{") - (char in ">)]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
