"""Subinterpreters: those that share the GIL work, isolated ones are refused in cffi's words (up to
3.11 in Python's own, where a thread is started), and neither takes the process with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.children import done
from tests.helpers.stress_strength import scaled
from tests.stress.gauges import counted

HERE = Path(__file__).parent
REFUSAL = (
    "module _cffi_backend does not support loading in subinterpreters"
    if sys.version_info >= (3, 12)
    else "thread is not supported for isolated subinterpreters"  # which a watchdog has
)
PROGRAM = (HERE / "subinterpreting.py").read_text()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["legacy", "isolated"])
def test_subinterpreters(kind: str, order: str) -> None:
    is_refused = kind == "isolated"
    if is_refused and order == "before" and sys.version_info[:2] == (3, 12):
        pytest.skip("3.12 corrupts its own memory when an isolated one imports the same first")
    if kind == "legacy" and not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("without a GIL none shares it")
    library = counted()
    status, out, err = done(PROGRAM, kind, order, library, str(scaled(100_000, 100)))
    assert (status, err) == (0, "")
    *told, numbers = out.splitlines()
    assert len(told) == 3
    if is_refused:
        assert all(REFUSAL in line for line in told), out
    else:
        assert told == ["works"] * 3, out
    # Doubled by each that works, and by the main interpreter.
    doubled = (0 if is_refused else 3) + 1 + (order == "after")
    assert numbers == str([2.0**doubled] * 4)
