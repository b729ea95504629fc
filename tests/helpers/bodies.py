"""Tests that are written once, for the CPU, and run on a GPU as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType


def bodies_of(*modules: ModuleType) -> dict[str, Callable[..., object]]:
    """The tests of other modules that take a `machine`, under names that say whose they are."""
    found = {
        f"test_{module.__name__.rpartition('test_')[2]}_{name.removeprefix('test_')}": test
        for module in modules
        for name, test in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("test_") and "machine" in inspect.signature(test).parameters
    }
    assert found, "no test of these takes a machine"
    return found
