"""The examples run, as a reader would run them."""

from __future__ import annotations

import pytest

from tests.helpers.example_runs import EXAMPLES, run

# cute_kernels.py has functions to compile, and does nothing when it is run.
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    done = run(str(EXAMPLES / name))
    if "GPUs are needed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout
