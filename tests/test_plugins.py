"""The plugins of the suite, each in a suite of its own that pytest runs in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import sampling, settled

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
from tests.helpers import budgets, expectations, sampling, settled

expectations.install()
pytest_addoption = sampling.add_options


def pytest_configure(config):
    for plugin in (budgets, expectations, sampling, settled):
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


def run(folder: Path, *arguments: str, more: str = "") -> str:
    """What pytest prints in a folder with a suite of its own, and these plugins."""
    (folder / "conftest.py").write_text(CONFTEST + more)
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


def ran(folder: Path, *arguments: str) -> tuple[set[str], str]:
    """The names of the tests that ran, and what was printed."""
    printed = run(folder, *arguments)
    return set(re.findall(r"(?:PASSED.*|)::(test_\w+(?:\[\d+\])?)", printed)), printed


def test_a_sample_is_drawn_alike_by_its_seed(tmp_path):
    """In one process and in two, which must collect alike."""
    (tmp_path / "test_many.py").write_text(MANY)
    first, printed = ran(tmp_path, "-n", "2")
    assert len(first) == sampling.CASES + 1 and "test_one" in first, printed
    seed = re.search(r"--sample-seed (\d+)", printed)[1]
    assert ran(tmp_path, "--sample-seed", seed)[0] == first
    assert ran(tmp_path, "--sample-seed", str(int(seed) + 1))[0] != first
    assert len(ran(tmp_path, "--all")[0]) == len(ran(tmp_path, "test_many.py")[0]) == 41


def test_what_a_run_is_of(tmp_path):
    files = {"ops/test_norm.py": "shown", "ops/test_rows.py": "more", "stress/test_long.py": "long"}
    for file, name in files.items():
        (tmp_path / "tests" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / file).write_text(f"def test_{name}(): assert True")
    assert ran(tmp_path)[0] == {"test_shown"}
    assert ran(tmp_path, "-n", "2")[0] == {"test_shown"}
    assert ran(tmp_path, "--sample")[0] == {"test_shown", "test_more"}
    every = {"test_shown", "test_more", "test_long"}
    assert ran(tmp_path, "--all")[0] == ran(tmp_path, "tests")[0] == every


SETTLED = """
[first]
tests = ["tests/first"]
files = ["package/*.py", "data"]
passed = ""

[second]
tests = ["tests/test_second.py"]
files = ["package/two.py"]
passed = ""
"""


def test_what_a_hash_settles(tmp_path):
    for name in ("first/test_first", "test_second", "test_always"):
        path = tmp_path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"def {path.stem}(): assert not (Path(__file__).parents[1] / 'broken').exists()"
        path.write_text(f"from pathlib import Path\n\n{text}\n")
    for name in ("package/one.py", "package/two.py", "data/below/it"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / settled.TABLE).write_text(SETTLED)
    (tmp_path / "pytest.ini").touch()
    every, second = {"test_first", "test_second", "test_always"}, {"test_second"}
    assert ran(tmp_path, "--unsettled")[0] == every
    (tmp_path / "broken").touch()  # of tests/test_second.py
    run(tmp_path, "--settle")
    assert [group.is_settled for group in settled.read(tmp_path)] == [True, False]
    (tmp_path / "broken").unlink()
    assert ran(tmp_path, "--unsettled", "-n", "2")[0] == every - {"test_first"}
    assert ran(tmp_path, "--settle", "-n", "2")[0] == second
    assert ran(tmp_path, "--unsettled")[0] == {"test_always"}
    assert ran(tmp_path, "--all")[0] == every
    for name in ("package/three.py", "data/below/it", "tests/first/test_first.py"):
        (tmp_path / name).write_text("def test_first(): assert True")
        assert [group.is_settled for group in settled.read(tmp_path)] == [False, True], name
        settled.write(tmp_path, settled.read(tmp_path))
    (tmp_path / "package" / "two.py").rename(tmp_path / "package" / "four.py")
    assert [group.is_settled for group in settled.read(tmp_path)] == [False, False]


BUSY = """
import subprocess, sys, time

def test_here():
    end = time.process_time() + 0.7
    while time.process_time() < end: pass
    assert True

def test_in_a_child():
    spin = "import time\\nwhile time.process_time() < 0.7: pass"
    assert not subprocess.run([sys.executable, "-c", spin]).returncode
"""


def test_a_folder_has_a_budget_of_cpu_seconds(tmp_path):
    """Of its processes and of those that they wait for; a run of a part is not held to it."""
    (tmp_path / "pytest.ini").touch()
    rows = "| `tests/short` | 30 |\n| `tests/*.py` | 1 |\n"
    (tmp_path / "CONTRIBUTING.md").write_text(rows)
    (tmp_path / "tests" / "short").mkdir(parents=True)
    for file in ("short/test_one.py", "test_two.py"):
        (tmp_path / "tests" / file).write_text(BUSY)
    for more in ((), ("-n", "2")):
        printed = run(tmp_path, "--all", *more)
        (took,) = re.findall(r"tests/\*\.py took (\d+) CPU seconds: its budget is 1", printed)
        assert 1 <= int(took) <= 4 and "4 passed" in printed, printed
        assert "tests/short took" not in printed
    assert "CPU seconds" not in run(tmp_path, "tests")
    (tmp_path / "CONTRIBUTING.md").write_text(rows.replace("| 1 |", "| 60 |"))
    printed = run(tmp_path, "--all")
    assert "took" not in printed and re.search(r"^ +\d +60 tests/\*\.py$", printed, re.MULTILINE)


def test_without_a_gpu_no_file_of_its_tests_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("print('read')")
    (folder / "test_it.py").write_text("print('read')\ndef test_it(): assert True")
    (tmp_path / "tests" / "test_more.py").write_text("def test_more(): assert True")
    for more in ([], ["-n", "2"]):
        monkeypatch.delenv("FI_FFI_RUN_GPU_TESTS", raising=False)
        names, printed = ran(tmp_path, "-rs", "-s", "--all", *more)
        assert names == {"test_more"} and "1 passed, 1 skipped" in printed, printed
        assert "\nread" not in printed and printed.count(sampling.NEEDS_GPU) == 1, printed
        monkeypatch.setenv("FI_FFI_RUN_GPU_TESTS", "1")
        names, printed = ran(tmp_path, "--all", *more)
        assert names == {"test_more", "test_it"} and "2 passed" in printed, printed


WITHOUT_KERNELS = """
import pytest
from fi_ffi.loader import search

def load(module):
    search.find_module(module)

@pytest.fixture
def loaded():
    load("norm")

def test_of_a_module():
    load("norm")

def test_set_up_with_a_module(loaded):
    assert False

def test_expects_that_there_is_none():
    with pytest.raises(LookupError, match="no kernels of module 'norm'"):
        load("norm")

def test_of_a_file_that_cannot_be_read():
    load("page")

def test_another_error():
    raise LookupError("norm")
"""


def test_a_gpu_test_without_its_module_is_skipped(tmp_path, monkeypatch):
    """It names the module and how to get it.  What fails otherwise, a file that is there among it,
    is no such test."""
    (tmp_path / "kernels" / "page").mkdir(parents=True)
    (tmp_path / "kernels" / "page" / "page.so").write_bytes(b"no library")
    monkeypatch.setenv("FI_FFI_KERNELS", str(tmp_path / "kernels"))
    (tmp_path / "test_without.py").write_text(WITHOUT_KERNELS)
    hooks = "from tests.gpu.conftest import pytest_runtest_call, pytest_runtest_setup\n"
    printed = run(tmp_path, "-rs", more=hooks)
    outcomes = dict(re.findall(r"::test_(\w+) (PASSED|FAILED|SKIPPED|ERROR)", printed))
    assert outcomes == {
        "of_a_module": "SKIPPED", "set_up_with_a_module": "SKIPPED",
        "expects_that_there_is_none": "PASSED", "of_a_file_that_cannot_be_read": "FAILED",
        "another_error": "FAILED",
    }, printed  # fmt: skip
    assert re.search(r"no kernels of module 'norm': `fi-ffi build .* norm` makes it", printed)


WRITING = """
import os
import tempfile
from pathlib import Path

def test_writes(tmp_path, record_property):
    for folder in (os.environ["FI_FFI_CACHE_DIR"], tempfile.mkdtemp(), tmp_path):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "left").write_text("something")
        print("wrote in", folder)
    assert True
"""


def test_what_is_shown_leaves_nothing(tmp_path, monkeypatch):
    """In the cache or the folder of temporary files, by one process or by several."""
    rooms, suite = tmp_path / "tmp", tmp_path / "suite"
    rooms.mkdir()
    suite.mkdir()
    monkeypatch.setenv("TMPDIR", str(rooms))
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    (suite / "test_writing.py").write_text(WRITING)
    for arguments in (("-s",), ("-n", "2")):
        names, printed = ran(suite, *arguments)
        assert names == {"test_writes"} and "1 passed" in printed, printed
        assert not [*rooms.iterdir()] and not (tmp_path / "cache").exists()
    assert len(re.findall(f"wrote in {rooms}", ran(suite, "-s")[1])) == 3
