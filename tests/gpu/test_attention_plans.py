"""Plans over time on a GPU: the tests of tests/attention/test_plans.py."""

from __future__ import annotations

from tests.attention import test_plans
from tests.helpers.bodies import bodies_of

globals().update(bodies_of(test_plans))
