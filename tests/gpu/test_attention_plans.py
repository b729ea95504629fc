"""Plans over time on a GPU: the tests of tests/attention/test_plans.py."""

from __future__ import annotations

from tests.attention import test_plans
from tests.helpers.bodies import tests_of

globals().update(tests_of(test_plans))
