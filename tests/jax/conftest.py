"""jax on the CPU, with two devices, and with 64-bit integers, which some indices are."""

from __future__ import annotations

import os

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 " + os.environ.get(
    "XLA_FLAGS", ""
)
jax = pytest.importorskip("jax", reason="jax is not installed")
jax.config.update("jax_enable_x64", True)
