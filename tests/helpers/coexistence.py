"""Orders in which libraries come into a process, and what has to hold of each."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.children import ROOT


def missing(names: Iterable[str]) -> dict[str, str]:
    """Why each library is left out, of those that are."""
    return {
        name: f"{name} is not installed" for name in names if importlib.util.find_spec(name) is None
    }


def orders(names: Sequence[str], more: int) -> list[str]:
    """fi_ffi with each other one, before and after it; each of all first and last, and each before
    and after every other; and `more` at random."""
    names = list(names)
    # All processes of pytest-xdist draw alike: they collect the same tests.
    draw = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    found = []
    for name in names:
        if name != "fi_ffi":
            found += [f"fi_ffi {name}", f"{name} fi_ffi"]
    found += [" ".join(names[i:] + names[:i]) for i in range(len(names))]
    found.append(" ".join(reversed(names)))
    found += [" ".join(draw.sample(names, len(names))) for _ in range(more)]
    return list(dict.fromkeys(found))


def run(order: str, machine: str, kernels: Path | None, environment: Mapping[str, str]) -> Any:
    """One process; what it found mapped after each step."""
    path = filter(None, (str(ROOT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")))
    given = [] if kernels is None else [str(kernels)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.coexisting", order, machine, *given],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{order}\n{done.stdout}{done.stderr[-6000:]}"
    for word in ("Exception ignored", "Traceback"):
        assert word not in done.stderr, f"{order}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(
    order: str, machine: str, kernels: Path | None, environment: Mapping[str, str]
) -> list[str]:
    """One libtvm_ffi and one CUDA runtime, and fi_ffi brings neither where one is there.

    What was in the process, step by step: each library of the order, and then all.
    """
    steps = run(order, machine, kernels, environment)
    before: dict[str, list[str]] = {}
    for step in steps:
        found = step["mapped"]
        assert len(found["libtvm_ffi"]) <= 1, f"{order}: {found} after {step['after']}"
        if step["after"] == "fi_ffi":
            assert len(found["libtvm_ffi"]) == 1
            for name, paths in before.items():
                assert not paths or found[name] == paths, f"{order}: fi_ffi brought {found[name]}"
        before = found
    if len(before["libcudart"]) > 1:
        others = " ".join(name for name in order.split() if name != "fi_ffi")
        alone = run(others, machine, kernels, environment)[-1]["mapped"]["libcudart"]
        assert len(alone) >= len(before["libcudart"]), f"{order}: {before['libcudart']}"
        pytest.xfail(f"{others} alone map {len(alone)} CUDA runtimes: {alone}")
    return [step["after"] for step in steps]
