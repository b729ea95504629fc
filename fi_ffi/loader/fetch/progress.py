"""Progress display on standard error: bars on a terminal, else lines."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fi_ffi.errors import printable
from fi_ffi.loader.fetch.download import Report, Reporter

_LINE_EVERY_S = 10.0  # between lines without a terminal


class Lines:
    """Progress as lines: one every ten seconds, and one at the end."""

    def __init__(self, in_bytes: bool) -> None:
        self._in_bytes, self._last = in_bytes, float("-inf")
        self._begun: dict[str, tuple[float, int]] = {}

    def say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def step(self, name: str, done: int, total: int | None, each: str = "") -> None:
        if each:
            self.say(f"{name}: {done + 1} of {total}, {each}")
            return
        now = time.monotonic()
        begun, before = self._begun.setdefault(name, (now, done))
        if now - self._last < _LINE_EVERY_S and done != total:
            return
        self._last = now
        rate = (done - before) / max(now - begun, 1e-9)
        amounts = [n for n in (done, total) if n is not None]
        if self._in_bytes:
            text = " of ".join(f"{n / 1e6:,.1f}" for n in amounts) + f" MB, {rate / 1e6:,.1f} MB/s"
        else:
            text = "/".join(map(str, amounts)) + f" in {_clock(now - begun)}"
        left = f", about {_clock((total - done) / rate)} left" if total and rate else ""
        self.say(f"{name}: {text}{left}")


class Bars:
    """Progress as a bar for each name, with messages above the bars."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, soft_wrap=True)

    def step(self, name: str, done: int, total: int | None, each: str = "") -> None:
        text = escape(printable(each or name))
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(text, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total, description=text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def shown(
    quiet: bool, *, in_bytes: bool = False, transient: bool = False
) -> Iterator[Lines | Bars | None]:
    """Yield a display on standard error: bars on a terminal, else lines; None if `quiet`."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield None
    elif not console.is_terminal:
        yield Lines(in_bytes)
    else:
        of_bytes = (DownloadColumn(), TransferSpeedColumn())
        amounts = of_bytes if in_bytes else (MofNCompleteColumn(), TimeElapsedColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=transient) as progress:
            yield Bars(progress)


def _is_terminal() -> bool:
    return Console(stderr=True).is_terminal


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done, until the block ends; show nothing elsewhere.

    Yields a function that updates the text.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status(escape(printable(what))) as status:
        yield lambda what: status.update(escape(printable(what)))


@contextmanager
def reporter(quiet: bool = False) -> Iterator[Reporter | None]:
    """Yield a callable for the `report=` argument of downloads."""

    def report(at: Report) -> None:
        assert display is not None
        display.step(at.name, at.done, at.total)

    with shown(quiet, in_bytes=True, transient=True) as display:
        yield report if display else None


@contextmanager
def counter(
    name: str, total: int, quiet: bool = False, *, lines: bool = True
) -> Iterator[Callable[[str], None]]:
    """Show which of `total` items is processed; call the yielded function with each name.

    With `lines=False`, nothing is shown without a terminal; use it for work that is usually quick.
    """
    numbers = itertools.count()
    with shown(quiet or not (lines or _is_terminal()), transient=True) as display:
        if display:
            yield lambda each: display.step(name, next(numbers), total, each)
        else:
            yield lambda each: None
