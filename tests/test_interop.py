"""The examples of examples/interop without a GPU, and that their checks can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import coexistence, embedding

EXAMPLES = Path(__file__).parents[1] / "examples" / "interop"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "checks")
# The others use numpy where there is no GPU.
MISSING = coexistence.missing(["torch", "jax"])

# A norm of weights that are 1 higher, and attention to the last keys only.
FAULTS = {
    "normalised is wrong": ("fused_add_rmsnorm", "fi_ffi.gemma_fused_add_rmsnorm"),
    "request 0 is wrong": ("BatchDecodePlan", "partial(fi_ffi.BatchDecodePlan, window_left=5)"),
}
# Nothing is appended; the batch that was planned first is run each time.
MORE = {
    "numba_arrays": (
        "fi_ffi.append_paged_kv_cache = lambda *args, **more: None",
        "a token is in the wrong place",
    ),
    "torch_graphs": (
        "fi_ffi.BatchDecodePlan.replan = lambda *args, **more: None",
        "request 0 is wrong",
    ),
}


def skip_where_missing(name: str) -> None:
    library = name.partition("_")[0]
    if library in MISSING:
        pytest.skip(MISSING[library])


def with_fault(name: str, program: str) -> subprocess.CompletedProcess[str]:
    program = f"""
import sys
from functools import partial
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv[1:] = ["--cpu"]
import fi_ffi
import {name} as example
{program}
example.main()
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu(name: str) -> None:
    skip_where_missing(name)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+(?: \d)?): largest error", done.stdout, re.M)[:5] == [
        "residual", "normalised", "request 0", "request 1", "request 2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_its_check_can_fail(name: str) -> None:
    skip_where_missing(name)
    (first, (op, fault)), (last, (plan, window)) = FAULTS.items()
    program = f"""
right, fi_ffi.{op} = fi_ffi.{op}, {fault}
try:
    example.main()
except AssertionError as error:
    print("noticed:", error)
fi_ffi.{op}, fi_ffi.{plan} = right, {window}
"""
    done = with_fault(name, program)
    assert f"noticed: {first}" in done.stdout, done.stderr
    assert done.returncode == 1
    assert f"AssertionError: {last}" in done.stderr


@pytest.mark.parametrize("name", MORE)
def test_more_of_it_can_fail(name: str) -> None:
    skip_where_missing(name)
    fault, wrong = MORE[name]
    done = with_fault(name, fault)
    assert done.returncode == 1
    assert f"AssertionError: {wrong}" in done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C program was built, and run, by the README's lines."""
    folder = tmp_path_factory.mktemp("c_program")
    done = embedding.run(embedding.lines(embedding.FIRST), folder)
    (folder / "said").write_text(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_a_c_program(program: Path) -> None:
    """Three threads of C's, a refusal, a silent end."""
    said = (program / "said").read_text()
    assert len(re.findall(r"^thread \d: 20 calls, largest error 0\.", said, re.M)) == 3
    assert "refused with code 1: fused_add_rmsnorm: argument `input`: got 0x0" in said


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ("fi_ffi.fused_add_rmsnorm(", "fi_ffi.gemma_fused_add_rmsnorm(", "wrong"),
        ('return 0, ""', 'return 2, "no words"', "no words"),
        # What is no error of fi_ffi's is a traceback, and not taken for a result.
        ('"float16"', "float(None)", "float() argument"),
    ],
)
def test_the_c_programs_check_can_fail(before: str, after: str, wrong: str, program: Path) -> None:
    calls = (embedding.FOLDER / "fi_ffi_calls.py").read_text()
    assert before in calls
    (program / "fi_ffi_calls.py").write_text(calls.replace(before, after))
    run = embedding.lines(embedding.FIRST).partition("export")
    done = embedding.run("".join(run[1:]), program)
    assert done.returncode == 1
    assert wrong in done.stderr
