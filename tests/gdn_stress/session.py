"""pytest's hooks for kernels that may hang, and the line that tells what was launched.

After a `HangError` nothing that asks the GPU comes back: the session is stopped, its report is
written, and the process is ended without taking anything down.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass

import pytest

import fi_ffi


@dataclass
class Count:
    """What the scenarios of a session did on a machine."""

    scenarios: int = 0
    launches: int = 0
    seconds: float = 0.0


counts: dict[str, Count] = {}
_hung = pytest.StashKey[bool]()


class counted:
    """Counts a scenario, the launches that its machine makes, and its time."""

    def __init__(self, name: str) -> None:
        self._count, self._start = counts.setdefault(name, Count()), time.monotonic()

    def done(self, launches: int) -> None:
        self._count.scenarios += 1
        self._count.launches += launches
        self._count.seconds += time.monotonic() - self._start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, fi_ffi.HangError):
        item.config.stash[_hung] = True
        item.session.shouldfail = f"HANG in {item.nodeid}: {call.excinfo.value.op}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in counts.items():
        terminalreporter.write_line(
            f"gdn stress: {count.launches} launches, {count.scenarios} scenarios, "
            f"{count.seconds:.1f} s on {name}"
        )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(_hung, False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)
