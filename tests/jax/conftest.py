"""jax on the CPU, with two devices, and with 64-bit integers, which some indices are."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IS_THERE = importlib.util.find_spec("jax") is not None

if IS_THERE:
    flags = "--xla_force_host_platform_device_count=2", os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))
    import jax

    jax.config.update("jax_enable_x64", True)


class _Left(pytest.File):
    """A file whose tests need jax, where there is none."""

    def collect(self) -> list[pytest.Item]:
        return [_Skipped.from_parent(self, name="all of it")]


class _Skipped(pytest.Item):
    def runtest(self) -> None:
        pytest.skip("jax is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> object:
    if IS_THERE or module_path.parent != HERE:
        return None
    return _Left.from_parent(parent, path=module_path)
