"""The examples without a GPU, as a reader would run them, and that their checks can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import coexistence, embedding

EXAMPLES = Path(__file__).parents[1] / "examples"
INTEROP = EXAMPLES / "interop"
# Tests of their own have the others: tests/jax/test_example.py and tests/interop.
_OTHERS = "checks", "jax_in_jit", "tinygrad_layer", "transformers_attention"
NAMES = sorted(path.stem for path in INTEROP.glob("*.py") if path.stem not in _OTHERS)
# The others use numpy where there is no GPU.
MISSING = coexistence.missing(["torch", "jax"])

PAGED, GDN = "paged_attention_cuda_python", "qwen3_next_gdn_cuda_python"
FAULTS = [
    # A token is not written, a page is taken twice, keys are swapped for values.
    (PAGED, "fi_ffi.append_paged_kv_cache = lambda *args, **more: None", "AssertionError: request"),
    (PAGED, "example.Pages.grow = lambda self, n, grow=example.Pages.grow: "
     "(grow(self, n), self.of.__setitem__(0, self.of[1][:len(self.of[0])]))",
     "AssertionError: request"),
    (PAGED, "fi_ffi.append_paged_kv_cache = lambda k, v, *rest, append=fi_ffi.append_paged_kv_cache"
     ", **more: append(v, k, *rest, **more)", "AssertionError: request"),
    # A state that is not carried on, and tokens taken the other way round.
    (GDN, "alone = fi_ffi.gdn_prefill\n"
     "fi_ffi.gdn_prefill = lambda **a: alone(**a | {'input_state': None})", "is wrong"),
    (GDN, "plain = example.token_by_token\n"
     "example.prefill.__globals__['token_by_token'] = lambda layer, x: plain(layer, x[::-1])",
     "is wrong"),
    # Nothing is appended; the batch that was planned first is run each time.
    ("numba_arrays", "fi_ffi.append_paged_kv_cache = lambda *args, **more: None",
     "AssertionError: a token is in the wrong place"),
    ("torch_graphs", "fi_ffi.BatchDecodePlan.replan = lambda *args, **more: None",
     "AssertionError: request 0 is wrong"),
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def with_fault(name: str, program: str) -> subprocess.CompletedProcess[str]:
    """An example that is run after a program has changed something, or by it."""
    library = name.partition("_")[0]
    if library in MISSING:
        pytest.skip(MISSING[library])
    setup = f"""
import sys
from functools import partial
sys.path[:0] = {[str(EXAMPLES), str(INTEROP)]!r}
sys.argv[1:] = ["--cpu"] + ["--steps", "8"] * ({name!r} == {PAGED!r})
import fi_ffi
import {name} as example
"""
    return run("-c", f"{setup}\n{program}\nexample.main()\n")


def test_every_program_takes_cpu() -> None:
    programs = [path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text()]
    assert len(programs) >= 16
    assert not [path.name for path in programs if '"--cpu"' not in path.read_text()]


def test_a_call() -> None:
    """On numpy arrays; and what it says where there is no GPU."""
    name = str(EXAMPLES / "rmsnorm_cuda_python.py")
    done = run(name, "--cpu")
    assert done.returncode == 0, done.stderr
    assert "32 rows of 4096: largest error" in done.stdout
    blind = subprocess.run(
        [sys.executable, name], capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert blind.returncode == 1
    assert re.fullmatch(r"CUDA: cudaError\w+; `fi-ffi doctor` tells of GPUs, .*\n", blind.stderr)


def test_paged_attention() -> None:
    done = run(str(EXAMPLES / f"{PAGED}.py"), "--cpu")
    assert done.returncode == 0, done.stderr
    assert "decode: 64 steps" in done.stdout
    pages = re.search(r"cache: (\d+) tokens in (\d+) of", done.stdout)
    # 64 tokens a request besides the prompts, in pages of 4.
    assert pages is not None and int(pages[1]) == 47 + 3 * 64 and int(pages[2]) == 17 + 18 + 26


def test_a_linear_attention_layer() -> None:
    done = run(str(EXAMPLES / f"{GDN}.py"), "--cpu")
    assert done.returncode == 0, done.stderr
    assert "request 1: 64 and 11 tokens" in done.stdout


def test_a_sum_over_ranks() -> None:
    done = run(str(EXAMPLES / "all_reduce.py"), "--cpu", "--ranks", "4")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines())[3] == "rank 3 of 4 on cpu: 10, by oneshot"


@pytest.mark.parametrize(("name", "fault", "wrong"), FAULTS)
def test_its_check_can_fail(name: str, fault: str, wrong: str) -> None:
    done = with_fault(name, fault)
    assert done.returncode == 1
    assert wrong in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_with_another_library(name: str) -> None:
    """As it is, then with weights that are 1 higher, then with attention to the last keys only."""
    done = with_fault(name, """
example.main()
right, fi_ffi.fused_add_rmsnorm = fi_ffi.fused_add_rmsnorm, fi_ffi.gemma_fused_add_rmsnorm
try:
    example.main()
except AssertionError as error:
    print("noticed:", error)
fi_ffi.fused_add_rmsnorm = right
fi_ffi.BatchDecodePlan = partial(fi_ffi.BatchDecodePlan, window_left=5)
""")  # fmt: skip
    assert re.findall(r"^(\w+(?: \d)?): largest error", done.stdout, re.M)[:5] == [
        "residual", "normalised", "request 0", "request 1", "request 2",
    ], done.stderr  # fmt: skip
    assert "noticed: normalised is wrong" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "AssertionError: request 0 is wrong" in done.stderr


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
