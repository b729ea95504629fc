"""The example with tinygrad on a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.helpers.example_runs import EXAMPLES, run, run_with

EXAMPLE = EXAMPLES / "interop" / "tinygrad_layer.py"
CUDA = {"DEV": "CUDA"}
ALONE = "from tinygrad import Tensor\nassert (Tensor.ones(4).contiguous() + 1).sum().item() == 8"


@pytest.fixture(autouse=True, scope="module")
def _works():
    if importlib.util.find_spec("tinygrad") is None:
        pytest.skip("tinygrad is not installed")
    done = run("-c", ALONE, **CUDA)
    if done.returncode:
        pytest.skip(f"tinygrad alone: {(done.stderr.strip() or 'no reason told').splitlines()[-1]}")


def test_it_steps():
    done = run(str(EXAMPLE), **CUDA)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "20 steps on CUDA: largest error" in done.stdout


FAULTS = {
    "norm": "fi_ffi.fused_add_rmsnorm = fi_ffi.gemma_fused_add_rmsnorm",
    "append": "fi_ffi.append_paged_kv_cache = lambda *args, **more: None",
    "replan": "fi_ffi.BatchDecodePlan.replan = lambda *args, **more: None",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_its_check_can_fail(fault):
    done = run_with(FAULTS[fault], EXAMPLE, **CUDA)
    assert done.returncode == 1
    assert "AssertionError: step" in done.stderr, done.stderr


def test_a_context_of_tinygrads_own_is_not_enough():
    """Why the example changes it: its memory is not there for kernels of the primary context."""
    done = run_with("example.use_primary_context = lambda device: None", EXAMPLE, **CUDA)
    assert done.returncode != 0, done.stdout
