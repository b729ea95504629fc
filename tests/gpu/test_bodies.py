"""Tests of tests/ops that a GPU runs as they are, with its own `machine`."""

from __future__ import annotations

from tests.helpers.bodies import bodies_of
from tests.ops import (
    test_activation,
    test_bgmv_moe,
    test_cascade,
    test_gdn_decode,
    test_gdn_forms,
    test_mamba,
    test_quantization,
    test_results,
    test_routing,
    test_state_update,
)
from tests.ops.test_gdn_forms import form  # noqa: F401  # a fixture of theirs

globals().update(
    bodies_of(
        test_activation,
        test_bgmv_moe,
        test_cascade,
        test_gdn_decode,
        test_gdn_forms,
        test_mamba,
        test_quantization,
        test_results,
        test_routing,
        test_state_update,
    )
)
