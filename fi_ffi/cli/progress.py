"""How downloads show their progress: a bar on a terminal, else lines, on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fi_ffi.loader.download import Report, Reporter

_LINE_EVERY_S = 10.0  # between lines where there is no terminal


class _Lines:
    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, report: Report) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S and report.done != report.total:
            return
        self._last = now
        total = f" of {report.total / 1e6:,.1f}" if report.total is not None else ""
        left = f", {report.remaining:.0f} s left" if report.remaining is not None else ""
        text = f"{report.done / 1e6:,.1f}{total} MB, {report.rate / 1e6:,.1f} MB/s{left}"
        click.echo(f"{report.name}: {text}", err=True)


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, report: Report) -> None:
        if report.name not in self._tasks:
            self._tasks[report.name] = self._bar.add_task(report.name)
        task = self._tasks[report.name]
        self._bar.update(task, completed=report.done, total=report.total)


@contextmanager
def reporter(quiet: bool = False) -> Iterator[Reporter | None]:
    """What to pass as `report=` to whatever downloads."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield None
    elif not console.is_terminal:
        yield _Lines()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield _Bar(bar)
