"""Attention's results on a GPU: the tests of tests/attention/test_results.py, at all sizes."""

from __future__ import annotations

from tests.attention import test_results
from tests.helpers.bodies import bodies_of

globals().update(bodies_of(test_results))
