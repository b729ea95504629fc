"""Progress as it is shown: a bar on a terminal, else lines, on standard error."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fi_ffi.loader.download import Report, Reporter

_LINE_EVERY_S = 10.0  # between lines where there is no terminal


class Pace:
    """When the next line of progress is due."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def due(self, last: bool) -> bool:
        """Whether a line is due now; the last one always is."""
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S and not last:
            return False
        self._last = now
        return True


_Shown = TypeVar("_Shown")


@contextmanager
def shown(
    quiet: bool,
    lines: Callable[[], _Shown],
    bar: Callable[[Progress], _Shown],
    *columns: ProgressColumn,
    transient: bool = False,
) -> Iterator[_Shown | None]:
    """What shows progress on standard error: `bar` on a terminal, else `lines`, or nothing."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lines()
    else:
        with Progress(*columns, console=console, transient=transient) as progress:
            yield bar(progress)


class _Lines:
    def __init__(self) -> None:
        self._pace = Pace()

    def __call__(self, report: Report) -> None:
        if not self._pace.due(report.done == report.total):
            return
        total = f" of {report.total / 1e6:,.1f}" if report.total is not None else ""
        left = f", {report.remaining:.0f} s left" if report.remaining is not None else ""
        text = f"{report.done / 1e6:,.1f}{total} MB, {report.rate / 1e6:,.1f} MB/s{left}"
        print(f"{report.name}: {text}", file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, report: Report) -> None:
        if report.name not in self._tasks:
            self._tasks[report.name] = self._bar.add_task(report.name)
        task = self._tasks[report.name]
        self._bar.update(task, completed=report.done, total=report.total)


def reporter(quiet: bool = False) -> AbstractContextManager[Reporter | None]:
    """What to pass as `report=` to whatever downloads."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return shown(quiet, _Lines, _Bar, *columns, transient=True)


@contextmanager
def counter(name: str, total: int, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show which of so many things is worked at; called with each one's name as it begins."""

    def lines() -> Callable[[str], None]:
        numbers = itertools.count(1)
        return lambda each: print(
            f"{name}: {next(numbers)} of {total}, {each}", file=sys.stderr, flush=True
        )

    def bar(progress: Progress) -> Callable[[str], None]:
        task = progress.add_task(name, total=total)
        numbers = itertools.count()
        return lambda each: progress.update(task, completed=next(numbers), description=each)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with shown(quiet, lines, bar, *columns, transient=True) as count:
        yield count or (lambda each: None)
