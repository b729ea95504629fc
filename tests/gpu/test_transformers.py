"""The example with transformers on a GPU."""

from __future__ import annotations

import pytest

from tests.helpers.example_runs import EXAMPLES, run, run_with

EXAMPLE = EXAMPLES / "interop" / "transformers_attention.py"


@pytest.fixture(autouse=True, scope="module")
def _works():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


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
    done = run_with(FAULTS[fault], EXAMPLE)
    assert done.returncode == 1
    assert "AssertionError: Qwen3, dynamic cache: the logits are wrong" in done.stderr, done.stderr
