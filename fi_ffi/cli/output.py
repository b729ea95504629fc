"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PLAIN_WIDTH = 200  # columns, where the output is not a terminal that has a width

STATUS_STYLE = {"none": "dim", "ok": "green", "warn": "yellow", "fail": "bold red"}


def console() -> Console:
    """A console on standard output; no colours and no wrapping where it is a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def printable(text: str) -> str:
    """The text without what a terminal would obey: such characters become escapes.

    Names of symbols, members and arguments are whatever a file says they are.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class Failure(click.ClickException):
    """An error, for people; what it quotes of files is made printable."""

    def format_message(self) -> str:
        return printable(self.message)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[str] = (),
) -> None:
    """A table; the columns in `numbers` are aligned right, `ok`/`warn`/`fail` are coloured."""
    title = escape(printable(title))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console().print(table)


def _cell(value: object) -> str:
    text = printable(str(value))
    style = STATUS_STYLE.get(text)
    return f"[{style}]{text}[/]" if style else escape(text)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))
