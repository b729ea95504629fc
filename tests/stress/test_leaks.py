"""What is done a million times leaves nothing behind: docs/testing.md.

Each kind of work runs in a process of its own; `leaking.py` has them, `gauges.py` the bounds.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.children import environment
from tests.helpers.stress_strength import LONG, scaled
from tests.stress import gauges
from tests.stress.gauges import counted

COUNTS = {
    "calls": (1_000_000, 2000),
    "untyped": (1_000_000, 2000),
    "plans": (100_000, 600),
    "errors": (100_000, 2000),
    "loads": (10_000, 180),
    "scopes": (2_000_000, 2000),  # of which every twentieth opens a watchdog
    "descriptors": (1_000_000, 2000),
    "leaky": (2000, 2000),
}
HOUR = 3600


@functools.cache
def results(*kinds: str) -> dict[str, Any]:
    """What was found of each, by one program that has all of them in children."""
    wanted = [text for kind in kinds for text in (kind, str(scaled(*COUNTS[kind])))]
    command = [sys.executable, "-m", "tests.stress.leaking", counted()]
    done = subprocess.run(
        [*command, *wanted], capture_output=True, text=True, env=environment(), timeout=2 * HOUR,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if LONG:
        print(f"\n{done.stdout}")
    return {one["kind"]: one for one in found}


def result_of(kind: str) -> Any:
    return results(kind)[kind] if LONG else results(*COUNTS)[kind]


@pytest.mark.timeout(2 * HOUR)
@pytest.mark.parametrize("kind", [kind for kind in COUNTS if kind != "leaky"])
def test_nothing_grows(kind: str) -> None:
    assert gauges.excess(result_of(kind)) == []


def test_what_does_grow_is_found() -> None:
    """The gauges tell of an object kept by each call."""
    (told, *_) = gauges.excess(result_of("leaky"))
    assert told.startswith("blocks grew by")
