"""xgrammar's masks on logits of a GPU, before a sampler: the tests of tests/modules."""

from __future__ import annotations

from tests.helpers.bodies import bodies_of
from tests.modules import test_xgrammar

globals().update(bodies_of(test_xgrammar))
