"""Every op on CPU tensors against its formula, from its row alone."""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import HostArray
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import CALLS, check, draw
from tests.helpers.inputs import inputs_of

FORMS = [row for op in OPS.values() for row in op.rows[1:]]


@pytest.mark.parametrize(("op", "dtypes", "sizes", "more"), CALLS)
def test_is_right(op, dtypes, sizes, more):
    assert check(draw(op, dtypes, sizes, more, np.random.default_rng()), HostArray) <= 1


@pytest.mark.parametrize("row", FORMS, ids=[f"{row.name} {row.releases}" for row in FORMS])
def test_forms_of_other_releases(row, rng):
    """What a row was before or became later, with all that it has then; and what is off is seen."""
    sizes, dtypes = inputs_of(row).small, default_dtypes(row)
    each = [sizes.get("n", 1)] * any(arg.axes == "seeds" for arg in row.tensors)
    for seeds in (1, *each):
        sizes = {**sizes, "seeds": seeds, "offsets": seeds, "page_size": 4}
        case = make_case(row, sizes, dtypes, rng)
        # All that it writes is judged, but for scratch memory.
        scratch = {arg.name for arg in row.tensors if arg.writes} - case.expected.keys()
        names = {name.removeprefix("maybe_") for name in scratch}
        assert names <= {"row_states_buffer", "workspace", "workspace_buffer"}
        Op(row)(**case.arrays, **case.scalars)
        for out in case.expected:
            assert case.error(out, case.arrays[out])[1] <= 1
            wrong = case.arrays[out].copy()
            wrong.view(np.uint8).reshape(-1)[-1] ^= 1 if wrong.dtype == bool else 0xFF
            assert case.error(out, wrong)[1] > 1
