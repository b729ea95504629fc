"""The CPU seconds of each area of the tests, and the budgets that CONTRIBUTING.md states.

An area is a folder of tests/, or the files directly in it.  A test's seconds are its process's, and
those of the children that it has waited for.  The first test that asks for a shared fixture pays
for it.  A run of every case ends with a table, and fails where an area has taken more than its
budget.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

FILES = "*.py"  # the area of those directly in tests/
_KEY = "cpu seconds"
_ROW = re.compile(r"^\| `tests/(\S+)` \| (\d+) \|", re.MULTILINE)
_taken: dict[str, float] = defaultdict(float)


def budgets(root: Path) -> dict[str, int]:
    """Return the budget of each area, from the table in CONTRIBUTING.md."""
    page = root / "CONTRIBUTING.md"
    text = page.read_text() if page.is_file() else ""  # a suite of its own has none
    return {name: int(most) for name, most in _ROW.findall(text)}


def area_of(path: str) -> str:
    """Return the area of a test's file, whose path is from the root."""
    folders = path.split("/")[1:-1]
    return folders[0] if folders else FILES


def over(taken: dict[str, float], allowed: dict[str, int]) -> list[str]:
    """Return a line for each area that has taken more than its budget."""
    return [
        f"tests/{area} took {taken[area]:.0f} CPU seconds: its budget is {most}"
        for area, most in allowed.items()
        if taken.get(area, 0) > most
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart() -> None:
    global _start
    _start = _now()


_start = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":  # the last one, which has to reach another process
        report.user_properties = [*report.user_properties, (_KEY, _now() - _start)]
    return report


def _now() -> float:
    return sum(os.times()[:4])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, seconds in report.user_properties:
        if name == _KEY:
            _taken[area_of(report.nodeid.partition("::")[0])] += float(str(seconds))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _is_of_all(terminalreporter.config):
        return
    terminalreporter.section("CPU seconds, and budgets")
    allowed = budgets(terminalreporter.config.rootpath)
    for area, seconds in sorted(_taken.items(), key=lambda each: -each[1]):
        terminalreporter.line(f"{seconds:7.0f} {allowed.get(area, '-'):>5} tests/{area}")
    for line in over(_taken, allowed):
        terminalreporter.line(line, red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not _is_of_all(config) or hasattr(config, "workerinput"):
        return
    if session.exitstatus == pytest.ExitCode.OK and over(_taken, budgets(config.rootpath)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_of_all(config: pytest.Config) -> bool:
    return bool(config.option.all or config.option.unsettled)
