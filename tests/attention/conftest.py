"""Fixtures of the attention tests on the CPU; those of tests/gpu make a `Gpu` instead."""

from __future__ import annotations

import pytest

from tests.attention.machines import Cpu


@pytest.fixture
def machine() -> Cpu:
    return Cpu()
