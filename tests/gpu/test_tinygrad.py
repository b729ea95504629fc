"""The example with tinygrad on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import kernels

EXAMPLE = Path(__file__).parents[2] / "examples" / "interop" / "tinygrad_layer.py"
ALONE = "from tinygrad import Tensor\nassert (Tensor.ones(4).contiguous() + 1).sum().item() == 8"


def run(*arguments):
    command = [sys.executable, *arguments]
    env = {**os.environ, "DEV": "CUDA"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    kernels.skip_if_missing(done.stderr)
    return done


@pytest.fixture(autouse=True, scope="module")
def _works():
    if importlib.util.find_spec("tinygrad") is None:
        pytest.skip("tinygrad is not installed")
    done = run("-c", ALONE)
    if done.returncode:
        pytest.skip(f"tinygrad alone: {(done.stderr.strip() or 'no reason told').splitlines()[-1]}")


def test_it_steps():
    done = run(str(EXAMPLE))
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
    done = run("-c", f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import fi_ffi
import tinygrad_layer as example
{FAULTS[fault]}
example.main()
""")  # fmt: skip
    assert done.returncode == 1
    assert "AssertionError: step" in done.stderr, done.stderr


def test_a_context_of_tinygrads_own_is_not_enough():
    """Why the example changes it: its memory is not there for kernels of the primary context."""
    done = run("-c", f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import tinygrad_layer as example
example.use_primary_context = lambda device: None
example.main()
""")  # fmt: skip
    assert done.returncode != 0, done.stdout
