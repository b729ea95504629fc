"""The suite itself: tests that check nothing fail, samples of cases, and the table of faults."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import mutate  # noqa: E402

from tests.helpers import sampling  # noqa: E402

CONFTEST = """
from tests.helpers import expectations, sampling

expectations.install()
pytest_addoption = sampling.add_options


def pytest_configure(config):
    for plugin in (expectations, sampling):
        config.pluginmanager.register(plugin)
"""
EXPECTING = """
import pytest

def beside(value):
    assert value

def test_nothing():
    len("nothing is asserted")

def test_nothing_in_a_loop():
    for value in ():
        assert value

def test_assert():
    assert True

def test_assert_in_a_function():
    beside(1)

def test_raises():
    with pytest.raises(ValueError):
        int("x")

def test_skip():
    pytest.skip("it is not run")
"""
MANY = """
import pytest

@pytest.mark.parametrize("case", range(40))
def test_many(case):
    assert case >= 0

def test_one():
    assert True
"""


def run(folder: Path, *arguments: str) -> str:
    """What pytest prints in a folder with a suite of its own, and these plugins."""
    (folder / "conftest.py").write_text(CONFTEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", "-v"]
    command += arguments
    names = {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | names, capture_output=True, text=True, check=False
    )
    return done.stdout


def test_a_test_that_expects_nothing_fails(tmp_path):
    (tmp_path / "test_expecting.py").write_text(EXPECTING)
    printed = run(tmp_path)
    outcomes = dict(re.findall(r"::(\w+) (PASSED|FAILED|SKIPPED)", printed))
    assert outcomes == {
        "test_nothing": "FAILED", "test_nothing_in_a_loop": "FAILED", "test_assert": "PASSED",
        "test_assert_in_a_function": "PASSED", "test_raises": "PASSED", "test_skip": "SKIPPED",
    }, printed  # fmt: skip
    assert printed.count("it asserts nothing and expects no error") >= 2


def test_a_sample_is_drawn_alike_by_its_seed(tmp_path):
    """In one process and in two, which must collect alike."""
    (tmp_path / "test_many.py").write_text(MANY)

    def ran(*arguments: str) -> tuple[set[str], str]:
        printed = run(tmp_path, *arguments)
        return set(re.findall(r"(?:PASSED.*|)::(test_\w+(?:\[\d+\])?)", printed)), printed

    (tmp_path / "tests" / "stress").mkdir(parents=True)
    (tmp_path / "tests" / "stress" / "test_long.py").write_text("def test_long(): assert True")
    first, printed = ran("-n", "2")
    assert len(first) == sampling.CASES + 1 and "test_one" in first, printed
    seed = re.search(r"--sample-seed (\d+)", printed)[1]
    assert ran("--sample-seed", seed)[0] == first
    assert ran("--sample-seed", str(int(seed) + 1))[0] != first
    assert len(ran("--all")[0]) == len(ran("test_many.py", "tests")[0]) == 42


def test_every_fault_of_the_table_can_be_put_in():
    mutants = mutate.read()
    assert len(mutants) >= 80
    for mutant in mutants:
        assert mutant.applied(ROOT) != (ROOT / mutant.file).read_text()
        for file in mutant.tests.split():
            assert (ROOT / file.partition("::")[0]).exists(), mutant
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants)
