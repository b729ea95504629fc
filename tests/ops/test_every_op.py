"""Every op on CPU tensors against its formula, from its row alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.calls import HostArray
from tests.helpers.every_op import CALLS, check, draw


@pytest.mark.parametrize(("op", "dtypes", "sizes", "more"), CALLS)
def test_is_right(op, dtypes, sizes, more):
    assert check(draw(op, dtypes, sizes, more, np.random.default_rng()), HostArray) <= 1
