"""pytest's hooks for kernels that may hang, and the line that tells what was launched.

After a `HangError` nothing that asks the GPU comes back: the session is stopped, its report is
written, and the process is ended without taking anything down.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Generator

import pytest

import fi_ffi

# Scenarios, launches and seconds of a session, by the machine's name.
counts: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
_hung = pytest.StashKey[bool]()


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
    for name, (scenarios, launches, seconds) in counts.items():
        terminalreporter.write_line(
            f"gdn stress: {launches} launches, {scenarios} scenarios, {seconds:.1f} s on {name}"
        )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(_hung, False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)
