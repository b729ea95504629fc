"""Write docs/reference.md: docstrings, in the order of tools/data/reference.md; `--check` compares.

A line there that begins with `@ ` names a class or function, and after a colon its members. For
`@names` stand the several names of plans' arguments.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

TARGET = ROOT / "docs" / "reference.md"
TEMPLATE = ROOT / "tools" / "data" / "reference.md"
# What Markdown would take for markup: docstrings are plain text, but for `code` and **bold**.
_MARKUP = re.compile(r"((?<!\w)\*\*\w[^*]*\*\*)|([*|\\<]|(?<!\w)_|_(?!\w)|\](?=\())")
_ARGUMENT = re.compile(r"([\w*][\w*, ]*?(?: \([^)]*\))?): (.*)", re.DOTALL)
_ITEM = re.compile(r"\s*[-*] ")


def found(name: str) -> Any:
    """What a dotted name stands for, from `fi_ffi` on."""
    value, path = importlib.import_module("fi_ffi"), "fi_ffi"
    for part in name.split("."):
        path += f".{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    return value


def _escaped(text: str) -> str:
    parts = text.split("`")
    for outside in range(0, len(parts), 2):
        parts[outside] = _MARKUP.sub(lambda m: m[1] or "\\" + m[2], parts[outside])
    return "`".join(parts)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _arguments(lines: list[str]) -> Iterator[str]:
    """Each argument as an item: its names, its default, and what it is."""
    entries: list[list[str]] = []
    for line in lines:
        if _indent(line) == _indent(lines[0]):
            entries.append([])
        entries[-1].append(line.strip())
    for entry in entries:
        text = " ".join(entry)
        match = _ARGUMENT.fullmatch(text)
        if match is None:
            yield f"- {_escaped(text)}"
            continue
        names, _, default = match[1].partition(" (")
        shown = ", ".join(f"`{name.strip()}`" for name in names.split(","))
        told = f" ({_escaped(default)}" if default else ""
        yield f"- {shown}{told}: {_escaped(match[2])}"


def markdown(doc: str) -> str:
    """A docstring's text."""
    parts = list[str]()
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.split("\n")
        if lines[0].strip() == "Args:":
            parts.append("\n".join(_arguments(lines[1:])))
        elif _indent(lines[0]) >= 4:
            parts.append("\n".join(["```text", inspect.cleandoc(block), "```"]))
        elif any(map(_ITEM.match, lines)):
            parts.append("\n".join(map(_escaped, lines)))
        else:
            parts.append(_escaped(" ".join(line.strip() for line in lines)))
    return "\n\n".join(parts)


def _signature(name: str, value: Any) -> str | None:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    given = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in signature.parameters.values()
        if each.name not in ("self", "cls")
    ]
    plain = signature.replace(parameters=given, return_annotation=inspect.Signature.empty)
    return f"{name}{plain}"


def _wrapped(call: str) -> str:
    """A call over several lines where it is long."""
    if len(call) <= 96:
        return call
    head, _, rest = call.partition("(")
    return "\n".join([f"{head}(", *(f"    {part}," for part in _parameters(rest[:-1])), ")"])


def _parameters(text: str) -> Iterator[str]:
    """Parameters as many to a line as fit."""
    line = ""
    for part in re.split(r", (?![^(\[{]*[)\]}])", text):
        if line and len(line) + len(part) > 88:
            yield line
            line = ""
        line += f"{', ' if line else ''}{part}"
    yield line


def _entry(level: int, name: str, value: Any) -> Iterator[str]:
    yield f"{'#' * level} `{name}`"
    is_error = isinstance(value, type) and issubclass(value, BaseException)
    if isinstance(value, property) or is_error:
        call = None
    else:
        call = _signature(name, value) if callable(value) else None
    if call and not call.endswith("()"):
        yield f"```text\n{_wrapped(call)}\n```"
    if is_error:
        bases = [base.__name__ for base in value.__bases__]
        yield f"Bases: {', '.join(f'`{base}`' for base in bases)}."
    if name == "DTYPES":
        yield "Every element type by its name."
    elif inspect.getdoc(value):
        yield markdown(inspect.getdoc(value) or "")


def entries(line: str) -> str:
    """What stands for a line of the template."""
    name, _, members = line.removeprefix("@ ").partition(":")
    value = found(name)
    short = name.rpartition(".")[2] if name.startswith("ops.") else name
    parts = [*_entry(3, short, value)]
    for member in members.split():
        own = inspect.getattr_static(value, member)
        own = own if isinstance(own, property) else getattr(value, member)
        parts += _entry(4, f"{short}.{member}", own)
    return "\n\n".join(parts) + "\n"


def names() -> str:
    """An item for each argument of plans that has several names."""
    same = importlib.import_module("fi_ffi.ops.attention.options").SAME
    return "\n".join(f"- {', '.join(f'`{name}`' for name in group)}" for group in same)


def _line(line: str) -> str:
    if line == "@names":
        return names()
    return entries(line) if line.startswith("@ ") else line


def text() -> str:
    return "\n".join(map(_line, TEMPLATE.read_text().splitlines())) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, text(), __file__))
