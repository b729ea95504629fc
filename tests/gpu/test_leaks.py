"""Calls, plans and graphs leave nothing behind on a GPU: its memory, the host's, descriptors.

Each kind of work runs in a process of its own; `stress/gauges.py` has the bounds.  GPU memory is
the whole GPU's: nothing else may use it meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.children import environment
from tests.helpers.stress_strength import scaled
from tests.stress import gauges

HOUR = 3600
COUNTS = {
    "calls": (1_000_000, 20_000),
    "pointers": (1_000_000, 10_000),
    "streams": (100_000, 2000),
    "captures": (1000, 100),
    "plans": (100_000, 500),
    "scratch": (100_000, 2000),
    "watched": (20_000, 200),
    "errors": (100_000, 1000),
    "kept": (2000, 400),
}


def run(kind: str) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.stress.leaking_gpu"]
    done = subprocess.run(
        [*command, kind, str(scaled(*COUNTS[kind]))], capture_output=True, text=True,
        env=environment(), timeout=2 * HOUR, check=False,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stderr) == (0, "")
    print(done.stdout)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(2 * HOUR)
@pytest.mark.parametrize("kind", [kind for kind in COUNTS if kind != "kept"])
def test_nothing_grows(kind: str) -> None:
    assert gauges.excess(run(kind)) == []


def test_what_does_grow_is_found() -> None:
    """GPU memory that each call keeps is told of."""
    told = " ".join(gauges.excess(run("kept")))
    assert "gpu grew by" in told
