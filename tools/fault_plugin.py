"""A plugin of pytest for tools/fault_tests.py: a few cases of each test, in an order, for a time.

The file that `FAULT_TESTS` names says what to run; `FAULT_REPORT` names the one to write.
While coverage.py measures, its context is the running test, in child processes too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

_NO_TIME = "no more time"
_began = time.monotonic()
_is_traced = sys.gettrace() is not None
_wanted = json.loads(Path(os.environ["FAULT_TESTS"]).read_text())
_report: dict[str, list[object]] = {"failed": [], "passed": []}
_seconds: dict[str, float] = defaultdict(float)
if "order" in _wanted:  # a fault may ask for any amount of memory
    _most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (_most, _most))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep `cases` of each test, spread over all; or the tests of `order`, in that order."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[function_of(item.nodeid)].append(item)
    kept = (
        _in_order(items, tests, _wanted["order"])
        if "order" in _wanted
        else [item for cases in tests.values() for item in _spread(cases, _wanted["cases"])]
    )
    dropped = set(items) - set(kept)
    config.hook.pytest_deselected(items=[*dropped])
    items[:] = kept


def _in_order(
    items: list[pytest.Item], tests: dict[str, list[pytest.Item]], order: list[str]
) -> list[pytest.Item]:
    """The items that are named, all items of files that are named, and other cases of the tests."""
    by_name: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_name[item.nodeid].append(item)
        by_name[item.nodeid.partition("::")[0]].append(item)
    named = [item for name in order for item in by_name[name]]
    named += [item for name in order for item in tests.get(function_of(name), [])]
    return [item for item in dict.fromkeys(named) if item.nodeid not in _wanted["without"]]


def _spread(cases: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most so many cases, from all over them."""
    count = len(cases)
    return cases if count <= most else [cases[i * count // most] for i in range(most)]


def function_of(test: str) -> str:
    """The id of a test without its case."""
    return test.partition("[")[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):  # type: ignore[no-untyped-def]
    if "seconds" in _wanted and time.monotonic() - _began > _wanted["seconds"]:
        item.session.shouldstop = _NO_TIME
    if "FAULT_CONTEXT" not in os.environ:
        return (yield)
    import coverage

    # A test that interrupts itself may do so while coverage.py holds a lock, which no handler of a
    # signal could end.
    faulthandler.dump_traceback_later(_wanted["hangs"], exit=True)
    measured = coverage.Coverage.current()
    os.environ["FAULT_CONTEXT"] = item.nodeid.replace("$", "_")
    if measured is not None:
        if _is_traced and sys.gettrace() is None:  # a test has traced something itself
            measured.stop()
            measured.start()
        measured.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.environ["FAULT_CONTEXT"] = ""
        if measured is not None:
            measured.switch_context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _report["failed"].append(report.nodeid)
    elif report.when == "call" and report.passed:
        _report["passed"].append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _report["failed"].append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        if session.shouldstop == _NO_TIME and not _report["failed"]:
            session.exitstatus = pytest.ExitCode.OK
        told = {**_report, "seconds": {name: round(s, 3) for name, s in _seconds.items()}}
        Path(os.environ["FAULT_REPORT"]).write_text(json.dumps(told))
