"""The suite itself: its lists of tests, tests that show little, and the table of faults."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import mutate  # noqa: E402

from fi_ffi import errors  # noqa: E402

from tests.helpers import budgets, sampling, settled  # noqa: E402


def test_what_is_settled_is_of_files():
    """Each pattern names some, and no test is of two groups."""
    table = settled.tomllib.loads((ROOT / settled.TABLE).read_text())
    for name, of in table.items():
        for pattern in of["tests"] + of["files"]:
            assert settled.matching(ROOT, [pattern]), (name, pattern)
    tests = [path for of in table.values() for path in settled.matching(ROOT, of["tests"])]
    assert len({*tests}) == len(tests)


def test_every_folder_has_a_budget():
    areas = {
        budgets.area_of(f"{path.relative_to(ROOT)}") for path in ROOT.glob("tests/**/test_*.py")
    }
    assert budgets.budgets(ROOT).keys() == areas - {"gpu"}


def test_gpu_tests_can_be_collected():
    """On any machine: what they import and their cases' arguments are there."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    names = {"PYTHONPATH": str(ROOT), "FI_FFI_RUN_GPU_TESTS": "1", "FI_FFI_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "tests/gpu"], cwd=ROOT, env=os.environ | names, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {*re.findall(r"^(tests/gpu/\w+\.py): \d+$", done.stdout, re.MULTILINE)}


_ERRORS = {name for name in vars(errors) if name.endswith("Error")}


def weak_spots(text: str) -> list[int]:
    """Lines of a file of tests where one lets errors of ours pass for no reason told, or numbers
    its cases, so that a failure does not say what failed."""
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "ids":
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "range":
                found.append(node.value.lineno)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
                if not ast.unparse(call.func).endswith("suppress"):
                    continue
                names = {ast.unparse(name).rpartition(".")[2] for name in call.args}
                if names & _ERRORS and "#" not in lines[call.lineno - 1]:
                    found.append(call.lineno)
    return found


def test_no_test_is_of_a_weak_kind():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        assert not weak_spots(path.read_text()), path
    weak = """@parametrize("x", WRONG, ids=range(3))
def test_a(x):
    with suppress(ArgumentError):
        f(x)
"""
    assert sorted(weak_spots(weak)) == [1, 3]
    mended = weak.replace("ids=range(3)", "ids=WRONG").replace("Error):", "Error):  # why")
    assert not weak_spots(mended)


def test_what_is_shown_is_there():
    assert not [file for file in sampling.SHOWN if not (ROOT / "tests" / file).is_file()]
    assert len({*sampling.SHOWN}) == len(sampling.SHOWN)


def test_every_fault_of_the_table_can_be_put_in():
    mutants = mutate.read()
    assert len(mutants) >= 80
    for mutant in mutants:
        assert mutant.applied(ROOT) != (ROOT / mutant.file).read_text()
        for file in mutant.tests.split():
            assert (ROOT / file.partition("::")[0]).exists(), mutant
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants)
