"""Block-sparse attention and cascades on a GPU, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

import fi_ffi

from tests.helpers.sparse_calls import SPECS, Cascade, Sparse, Variable

LONG = {
    "long blocks": Sparse(M=2000, N=8192, R=64, C=64, heads=2, kv_heads=1, density=0.2),
    "long blocks fa2, masks": Sparse(M=700, N=4096, R=64, C=16, heads=2, mask=True),
    "long variable": Variable(rows=9, columns=40, qo_len=900, kv_len=6000, group=1),
    "long levels": replace(Cascade(), most_keys=5000, heads=2, kv_heads=1),
    "many requests": Cascade(shares=(64, 16, 1), queries=(1,) * 64, most_keys=900, causal=False),
}


@pytest.mark.parametrize("name", SPECS | LONG)
def test_against_float64(name, rng, to_gpu, stream, record_property):
    spec = (SPECS | LONG)[name]
    try:
        worst = spec.check(rng, to_gpu, "cuda:0", stream)
    except fi_ffi.KernelNotFoundError as error:
        pytest.skip(f"{error}".splitlines()[0])
    record_property("error_of_bound", worst)
    assert worst <= 1
