"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 200  # columns, where the output is not a terminal that has a width

STATUS_STYLE = {"none": "dim", "ok": "green", "warn": "yellow", "fail": "bold red"}


def console() -> Console:
    """A console on standard output; no colours and no wrapping where it is a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[str] = (),
) -> None:
    """A table; the columns in `numbers` are aligned right, `ok`/`warn`/`fail` are coloured."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console().print(table)


def _cell(value: object) -> str:
    text = str(value)
    style = STATUS_STYLE.get(text)
    return f"[{style}]{text}[/]" if style else text.replace("[", r"\[")


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))
