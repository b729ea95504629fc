"""`xqa_mla` on a GPU against float64: of SM120, which it was never run on."""

from __future__ import annotations

import pytest

import fi_ffi

from tests.attention.test_xqa_mla import SPECS
from tests.helpers.xqa_mla_calls import Batch


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name, rng, to_gpu, stream, record_property):
    try:
        worst = max(Batch(SPECS[name], rng).check(to_gpu, stream) for _ in range(2))
    except (fi_ffi.KernelNotFoundError, fi_ffi.ArchitectureError) as error:
        pytest.skip(f"{error}".splitlines()[0])
    record_property("error_of_bound", worst)
    assert worst <= 1
