"""Keys and values of 4 bits on a GPU: the tests of tests/attention/test_nvfp4.py."""

from __future__ import annotations

from tests.attention import test_nvfp4
from tests.helpers.bodies import bodies_of

globals().update(bodies_of(test_nvfp4))
