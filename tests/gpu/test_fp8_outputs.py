"""Outputs in fp8 on a GPU: the tests of tests/attention/test_fp8_outputs.py."""

from __future__ import annotations

from tests.attention import test_fp8_outputs
from tests.helpers.bodies import bodies_of

globals().update(bodies_of(test_fp8_outputs))
