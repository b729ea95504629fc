"""Tests of other folders that a GPU runs as they are, with its own `machine`."""

from __future__ import annotations

from importlib import import_module

from tests.helpers.bodies import bodies_of
from tests.ops.test_gdn_forms import form  # noqa: F401  # a fixture of theirs

MODULES = (
    "attention.test_fp8_outputs", "attention.test_mla_fp8", "attention.test_nvfp4",
    "modules.test_xgrammar", "ops.test_activation", "ops.test_bgmv_moe", "ops.test_cascade",
    "ops.test_gdn_decode", "ops.test_gdn_forms", "ops.test_kda", "ops.test_mamba",
    "ops.test_quantization", "ops.test_results", "ops.test_routing", "ops.test_state_update",
    "ops.test_tokenspeed",
)  # fmt: skip

globals().update(bodies_of(*(import_module(f"tests.{name}") for name in MODULES)))
