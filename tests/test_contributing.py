"""CONTRIBUTING.md and CHANGELOG.md: what they name is there; first contributions are open."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.table import ROWS
from tools.entries import entries_of

from tests.helpers.adding_an_op import files

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_paths(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = re.findall(r"\]\(([\w/.-]+)\)", text)
    paths += re.findall(r"`((?:fi_ffi|tests|tools|docs|\.ci)/[\w/.]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_first_contributions_are_entries_without_a_row() -> None:
    """When one gets its row, the line goes."""
    lines = re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE.partition("## A first")[2], re.MULTILINE)
    listed = [(module, entry) for module, names in lines for entry in re.findall(r"`(\w+)`", names)]
    assert len(listed) >= 4
    typed = {(row.module, row.symbol) for row in ROWS}
    entries = entries_of(the_lock().default_release)
    for module, entry in listed:
        assert (module, entry) not in typed, f"{module}.{entry} has a row: take it off the page"
        groups = [entries.of(module), *entries.of_family(module)]
        exported = [name for group in filter(None, groups) for name in group.entries]
        assert entry in exported, f"{module} exports no {entry}"
    assert "mhc_post" in str(files())


def test_the_counts() -> None:
    lines = sum(bool(line.strip()) for text in files().values() for line in text.splitlines())
    assert f"{lines + 1} lines in two files" in PAGE


def test_the_changelog_is_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [Unreleased]: {fi_ffi.__version__}" in text or f"## [{fi_ffi.__version__}]" in text


@pytest.mark.skipif(
    os.environ.get("FI_FFI_STRESS") != "long", reason="minutes; FI_FFI_STRESS=long runs it"
)
def test_the_commands(tmp_path: Path) -> None:
    """In a copy, in a new environment: what a contributor types."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", ".venv*", ".kernels", "build", ".git")
    shutil.copytree(ROOT, copy, ignore=ignored)
    path = f"{Path(sys.executable).resolve().parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("PYTHONPATH", None)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[:2]
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *blocks])], cwd=copy, env=environment, text=True,
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
