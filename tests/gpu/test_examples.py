"""The examples run, as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import kernels

EXAMPLES = Path(__file__).parents[2] / "examples"


# cute_kernels.py has functions to compile, and does nothing when it is run.
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    kernels.skip_if_missing(done.stderr)
    if "GPUs are needed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout
