"""Output of commands: lines and tables for people, JSON for programs.

Text is wrapped between words at the terminal's width or at `COLUMNS`. In a pipe it is not wrapped
unless `COLUMNS` is set. Names are never broken, and no line has trailing blanks. Colours (rich) are
used on a terminal if `NO_COLOR` is not set.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from fi_ffi.errors import printable

_INDENT = 4  # indentation of continuation lines
_SHORT = 20  # longest cell that is shown as a name, not as prose
_LEAST = 24  # least width for a table's last column; below it, rows are stacked

STATUS_STYLE = {"none": "dim", "ok": "green", "warn": "yellow", "fail": "bold red"}
# A key in a click context: whether a document was printed.
PRINTED_JSON = "fi_ffi.cli.printed_json"


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error."""
    system: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(highlight=False, soft_wrap=True, stderr=stderr, color_system=system)


def width(*, stderr: bool = False) -> int | None:
    """Return the width to wrap at, or None to disable wrapping."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text):
        return int(text)
    terminal = console(stderr=stderr)
    return terminal.width if terminal.is_terminal else None


def wrapped(text: str, columns: int | None, hang: int = 0) -> Iterator[str]:
    """Yield a text's lines, wrapped between words; continuation lines are indented by `hang`."""
    for line in text.split("\n"):
        if columns is None or len(line) <= columns:
            yield line.rstrip()
            continue
        start = len(line) - len(line.lstrip(" "))
        yield from textwrap.wrap(
            line.strip(),
            max(columns, start + hang + 1),
            initial_indent=" " * start,
            subsequent_indent=" " * (start + hang),
            break_long_words=False,
            break_on_hyphens=False,
        )


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 file`, `2 files`, `1,234 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(text: str, *, hang: int = _INDENT, err: bool = False) -> None:
    """Print a text, escaped and wrapped."""
    for line in wrapped(printable(text), width(stderr=err), hang):
        click.echo(line, err=err)


def for_people(message: str) -> str:
    """Return an error's message, escaped and wrapped to follow click's `Error: `."""
    # The NUL joins the prefix with the first word, so that wrapping accounts for it.
    before = "Error:\0"
    lines = wrapped(before + printable(message), width(stderr=True), _INDENT)
    return "\n".join(lines).removeprefix(before)


class Failure(click.ClickException):
    """A failure of a command, shown as its error."""


class Misuse(Failure):
    """A failure caused by wrong arguments."""

    exit_code = 2


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[str] = (),
) -> None:
    """Print a table; the columns in `numbers` are right-aligned, `ok`/`warn`/`fail` are coloured.

    The last column is wrapped to fit. If too little width is left for it, each row is stacked: its
    first cell, and below it the others with their columns' names.
    """
    cells = [[printable(str(value)).strip() for value in row] for row in rows]
    terminal = console()
    if title:
        for line in wrapped(printable(title), width(), _INDENT):
            terminal.print(Text(line, "bold"))
    for text in _table([*columns], cells, width(), {*numbers}):
        terminal.print(text)


def _table(
    columns: list[str], rows: list[list[str]], columns_wide: int | None, numbers: set[str]
) -> Iterator[Text]:
    widths = [
        max(len(part) for row in [columns, *rows] for part in row[i].split("\n"))
        for i in range(len(columns))
    ]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    if columns_wide is not None and indent + min(widths[-1], _LEAST) > columns_wide:
        yield from _stacked(columns, rows, columns_wide)
        return
    if any(columns):
        yield _row(columns, columns, widths, numbers, "bold", None)
    for row in rows:
        yield _row(row, columns, widths, numbers, None, columns_wide)


def _row(
    row: list[str],
    columns: list[str],
    widths: list[int],
    numbers: set[str],
    style: str | None,
    columns_wide: int | None,
) -> Text:
    text = Text()
    for name, cell, wide in zip(columns[:-1], row[:-1], widths[:-1], strict=True):
        cell = cell.rjust(wide) if name in numbers else cell.ljust(wide)
        text.append(f"{cell}  ", style or STATUS_STYLE.get(cell.strip()))
    indent = len(text)
    room = None if columns_wide is None else columns_wide - indent
    for i, line in enumerate(wrapped(row[-1], room)):
        if i:  # a word too long for the column goes on its own line
            is_long = room is not None and len(line) > room
            line = f"\n{'':{_INDENT if is_long else indent}}{line.lstrip() if is_long else line}"
        elif room is not None and len(line) > room:
            line = f"\n{'':{_INDENT}}{line}"
        text.append(line, style or STATUS_STYLE.get(row[-1]))
    parts = text.split("\n")
    for part in parts:
        part.rstrip()
    return Text("\n").join(parts)


def _stacked(columns: list[str], rows: list[list[str]], columns_wide: int) -> Iterator[Text]:
    """Yield each row as its first cell, and below it the others with their columns' names."""
    for row in rows:
        yield Text(row[0], STATUS_STYLE.get(row[0], ""))
        rest = [*zip(columns[1:], row[1:], strict=True)]
        named = [f"{name} {cell}".strip() for name, cell in rest if 0 < len(cell) <= _SHORT]
        prose = [cell for _, cell in rest if len(cell) > _SHORT]
        # The NUL keeps a column's name and its cell on one line.
        pairs = "  ".join(each.replace(" ", "\0") for each in named)
        for line in (pairs, *prose):
            if line:
                lines = wrapped(" " * _INDENT + line, columns_wide)
                yield Text("\n".join(lines).replace("\0", " "))


def print_json(document: Any) -> None:
    context = click.get_current_context(silent=True)
    if context is not None:
        context.find_root().meta[PRINTED_JSON] = True
    click.echo(json.dumps(document, indent=2))
