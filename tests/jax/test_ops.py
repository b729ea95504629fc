"""Every op inside jax.jit, against its formula in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import fi_ffi.jax
from fi_ffi.jax.results import is_given, is_result
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of


def results_of(case):
    """The names of a call's results, in order; what the call reads as well is given."""
    return [
        arg.name
        for arg in case.row.tensors
        if arg.writes and not arg.is_scratch and arg.name in case.arrays
    ]


def call_in_jit(case, told=()):
    """The results of a call of compiled code, by name."""
    row = case.row
    given = {
        arg.name: case.arrays[arg.name]
        for arg in row.tensors
        if is_given(arg) and arg.name in case.arrays
    }
    more = {
        arg.name: jax.ShapeDtypeStruct(case.arrays[arg.name].shape, case.arrays[arg.name].dtype)
        for arg in row.tensors
        if is_result(arg) and arg.name in case.arrays and (arg.optional or arg.name in told)
    }
    scalars = {name: value for name, value in case.scalars.items() if value is not None}
    function = functools.partial(fi_ffi.jax.call, row.name, **scalars, **more)
    found = jax.jit(lambda arrays: function(**arrays))(given)
    found = found if isinstance(found, tuple) else (found,)
    return dict(zip(results_of(case), map(np.asarray, found), strict=True))


# Gates and shifts are parts of one tensor there, which XLA does not pass.
PARTS = {name for name, op in OPS.items() if any(arg.parts > 1 for arg in op.row.tensors)}


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


# Results of which an op leaves some elements as they are.
PADDED = {"fp8_quantize_1x128": ("outScaleFP8SF",), "segment_packbits": ("y",)}

# Results whose shapes or dtypes follow from no argument.
TOLD = {
    **dict.fromkeys(("rmsnorm_quant", "fused_add_rmsnorm_quant"), ("out",)),
    "fused_qk_rmsnorm_rope": ("q_out", "k_out", "v_out"),
    "rope_quantize": ("q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"),
    "segment_packbits": ("y",),
    "seq_chunk_cumsum": ("output",),
    "nvfp4_kv_dequant": ("output",),
    **dict.fromkeys(("fp4_gemm", "mxfp8_gemm", "bf16_gemm", "bmm_bf16", "bmm_mxfp8"), ("out",)),
    "bmm_fp8": ("D",),
}
