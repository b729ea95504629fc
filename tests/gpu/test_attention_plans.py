"""Plans over time on a GPU: the tests of tests/attention/test_plans.py."""

from __future__ import annotations

from attention import test_plans
from helpers.bodies import tests_of

globals().update(tests_of(test_plans))
