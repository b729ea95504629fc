"""The example with transformers on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import kernels

EXAMPLE = Path(__file__).parents[2] / "examples" / "interop" / "transformers_attention.py"


@pytest.fixture(autouse=True, scope="module")
def _works():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


def run(*arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    kernels.skip_if_missing(done.stderr)
    return done


def test_it_generates():
    done = run(str(EXAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    # Six layers; a prefill, and 31 steps of decode.
    assert done.stdout.count("6 + 186 runs of plans") == 4


FAULTS = {
    "padding": "real = example.requests\n"
    "example.requests = lambda mask, length: real(mask | True, length)",
    "replan": "fi_ffi.BatchDecodePlan.replan = lambda *args, **more: None",
    "pages": "real = example.pages\nexample.pages = lambda cache: real(cache.roll(1, 2))",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_its_check_can_fail(fault):
    done = run("-c", f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import fi_ffi
import transformers_attention as example
{FAULTS[fault]}
example.main()
""")  # fmt: skip
    assert done.returncode == 1
    assert "AssertionError: Qwen3, dynamic cache: the logits are wrong" in done.stderr, done.stderr
