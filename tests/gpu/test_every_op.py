"""Every op on a GPU against its formula, from its row alone."""

from __future__ import annotations

import pytest

import fi_ffi
from fi_ffi.loader import machine

from tests.helpers import kernels
from tests.helpers.every_op import CALLS, check, draw


def needs(op) -> None:
    """Skip where the kernels here have no module for it, or the GPU is not one of its."""
    row = op.row
    if row.capabilities and machine.capability(0)[0] not in row.capabilities:
        pytest.skip(f"{row.name} is for compute capability {row.capabilities}")
    kernels.need(row)


@pytest.mark.parametrize(("op", "dtypes", "sizes", "more"), CALLS)
def test_is_right(op, dtypes, sizes, more, rng, to_gpu, stream):
    needs(op)
    for _ in range(3):
        assert check(draw(op, dtypes, sizes, more, rng), to_gpu, stream) <= 1


@pytest.mark.parametrize(("op", "dtypes", "sizes", "more"), CALLS)
def test_is_refused_on_other_gpus(op, dtypes, sizes, more, rng, to_gpu, stream):
    """Nothing is launched, and nothing written."""
    if not op.row.capabilities or machine.capability(0)[0] in op.row.capabilities:
        pytest.skip("runs on this GPU")
    case = draw(op, dtypes, sizes, more, rng)
    placed = {name: to_gpu(array) for name, array in case.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    with pytest.raises(fi_ffi.ArchitectureError, match=op.row.name):
        op(**descs, **case.scalars, stream=stream)
    for name, array in placed.items():
        assert array.get().tobytes() == case.arrays[name].tobytes()
