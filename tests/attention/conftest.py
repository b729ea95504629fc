"""Fixtures of the attention tests on the CPU; those of tests/gpu make a `Gpu` instead."""

from __future__ import annotations

import os

import numpy as np
import pytest

from attention.machines import Cpu


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(8), "little")
    print(f"seed {seed}")  # shown with a failure
    return np.random.default_rng(seed)


@pytest.fixture
def machine() -> Cpu:
    return Cpu()
