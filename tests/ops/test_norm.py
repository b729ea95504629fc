"""Norms: clamped values and copied ones; on the CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.sampling_calls import run
from tests.ops.test_results import VIDEO

OP = OPS["fused_qk_rmsnorm_rope"]


def case(rng, n=100, heads=(4, 3, 2), head_dim=128, output="bfloat16", **numbers: Any) -> Case:
    """A call of `fused_qk_rmsnorm_rope`."""
    axes = ("num_heads_q", "num_heads_k", "num_heads_v")
    sizes = {"n": n, "head_dim": head_dim, **dict(zip(axes, heads, strict=True))}
    if output == "float8_e4m3fn":
        numbers = {"output_quant_scale": 3.5, "v_quant_scale": 0.7} | numbers
    return make_case(OP.row, sizes, {"T": "bfloat16", "O": output}, rng, **VIDEO | numbers)


@pytest.mark.parametrize("output", OP.row.dtypes["O"])
def test_values_are_copied(output, machine, rng):
    """Bit for bit to bfloat16; and clamped to float8."""
    made = case(rng, 40, output=output, v_quant_scale=1.0)
    made.arrays["qkv_in"][0, -1, :4] = [1e4, -1e4, 0.0, -0.0]
    values = made.arrays["qkv_in"][:, -2:]
    got = run(machine, OP.row.name, made.arrays, **made.scalars)["v_out"]
    if output == "float8_e4m3fn":
        values = np.clip(values.astype(np.float32), -448, 448).astype(got.dtype)
    assert got.tobytes() == np.ascontiguousarray(values).tobytes()


def test_quantised_values_are_clamped_as_the_kernel_does():
    """±448 in both fp8 dtypes, and 448 for a NaN (CUDA's fminf prefers the number)."""
    x = np.array([[1, -1, 1e-3, np.nan]] * 2, np.float16)
    x[0, 3] = 1
    weight, scale = np.ones(4, np.float16), np.array([1e-6], np.float32)
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        out = np.zeros((2, 4), fi_ffi.DTYPES[dtype].numpy)
        fi_ffi.rmsnorm_quant(out, x, weight, scale)
        assert out[0, :2].astype(float).tolist() == [448, -448]
        assert out[1].astype(float).tolist() == [448] * 4


def test_stream_is_allowed_and_unused_on_the_cpu(rng):
    case = make_case(OPS["rmsnorm"].row, {"n": 4, "h": 32}, {"T": "float16"}, rng)
    fi_ffi.rmsnorm(**case.arrays, stream=0)
    assert case.error("out", case.arrays["out"])[1] <= 1
