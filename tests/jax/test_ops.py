"""Every op inside jax.jit, against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi.jax
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.in_jit import PADDED, PARTS, TOLD, call_in_jit
from tests.helpers.inputs import inputs_of


@pytest.mark.parametrize("name", sorted(OPS.keys() - PARTS))
def test_every_op(name, rng):
    row = OPS[name].row
    case = make_case(row, inputs_of(row).small, default_dtypes(row), rng)
    before = {name: array.tobytes() for name, array in case.arrays.items()}
    found = call_in_jit(case, TOLD.get(name, ()))
    assert case.expected.keys() <= found.keys()
    usual = {name: array.copy() for name, array in case.arrays.items()}
    if name in PADDED:
        OPS[name](**usual, **case.scalars)
    for result, got in found.items():
        if result in PADDED.get(name, ()):  # what the op leaves as it is stands for nothing
            is_left = usual[result] == case.arrays[result]
            is_left |= np.isnan(usual[result].astype(float))
            got = np.where(is_left, case.arrays[result], got)
        if result in case.expected:
            assert case.error(result, got)[1] <= 1, result
    assert {name: array.tobytes() for name, array in case.arrays.items()} == before


@pytest.mark.parametrize("name", sorted(PARTS))
def test_parts_of_a_tensor(name):
    with pytest.raises(fi_ffi.ArgumentError, match=f"got {name}, expected an op whose"):
        fi_ffi.jax.call(name)
