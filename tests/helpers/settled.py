"""Tests that a committed hash settles: they passed, and nothing that they are of has changed.

`tests/settled.toml` names groups of tests that take long, the files that they are of, and the hash
of these files at the time when all of the group passed.  `--unsettled` runs every case of all tests
but those of a group whose files still have that hash.  `--settle` runs the groups whose files have
another, and writes the hashes of those in which no test fails.  Other runs take no notice.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = "tests/settled.toml"
_passed, _failed = set[str](), set[str]()  # files of tests


@dataclass(frozen=True)
class Group:
    """Tests by their paths from the root, patterns of the files that they are of, the hash of both
    when they passed, and the hash now.
    """

    name: str
    tests: tuple[str, ...]
    passed: str
    hash: str

    @property
    def is_settled(self) -> bool:
        return self.passed == self.hash

    def has(self, path: str) -> bool:
        """Tell whether a file of tests belongs to the group."""
        return any(path == each or path.startswith(f"{each}/") for each in self.tests)


def matching(root: Path, patterns: list[str]) -> list[Path]:
    """Return the files below a root that patterns name, and those in folders that they name."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    below = {path for folder in found if folder.is_dir() for path in folder.rglob("*")}
    return sorted(path for path in found | below if path.is_file() and path.suffix != ".pyc")


def hash_of(root: Path, patterns: list[str]) -> str:
    """Return the hash of the names and contents of the files that patterns name."""
    digest = hashlib.sha256()
    for path in matching(root, patterns):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read(root: Path) -> list[Group]:
    """Return the groups of the table."""
    return [
        Group(name, tuple(of["tests"]), of["passed"], hash_of(root, of["tests"] + of["files"]))
        for name, of in tomllib.loads((root / TABLE).read_text()).items()
    ]


def write(root: Path, settled: list[Group]) -> None:
    """Put the hashes that groups have now into the table."""
    text = (root / TABLE).read_text()
    for group in settled:
        entry = re.compile(rf'(^\[{group.name}\]$.*?^passed = ")\w*(")', re.MULTILINE | re.DOTALL)
        text = entry.sub(rf"\g<1>{group.hash}\g<2>", text)
    (root / TABLE).write_text(text)


_GROUPS = pytest.StashKey[list[Group]]()


def pytest_configure(config: pytest.Config) -> None:
    asked = config.option.settle or config.option.unsettled
    config.stash[_GROUPS] = read(config.rootpath) if asked else []


def pytest_report_header(config: pytest.Config) -> list[str]:
    groups = config.stash[_GROUPS]
    words = [f"{each.name} ({'settled' if each.is_settled else 'changed'})" for each in groups]
    return [f"{TABLE}: {', '.join(words)}"] if words else []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    groups = config.stash[_GROUPS]
    if not groups or collection_path.suffix != ".py":
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    of = [group for group in groups if group.has(path)]
    if any(not group.is_settled for group in of):
        return None
    return True if of or config.option.settle else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    path = report.nodeid.partition("::")[0]
    if report.failed:
        _failed.add(path)
    elif report.passed and getattr(report, "when", None) == "call":
        _passed.add(path)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.option.settle and not hasattr(config, "workerinput"):
        groups = [each for each in config.stash[_GROUPS] if not any(map(each.has, _failed))]
        write(config.rootpath, [each for each in groups if any(map(each.has, _passed))])
