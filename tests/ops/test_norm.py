"""Norms: clamped values and copied ones; on the CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call.row import Tensor
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.sampling_calls import run
from tests.ops.test_results import _CHANNELS as CHANNELS
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


def far(*shape: int, dtype: str = "bfloat16") -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(1 << 40, shape, dtype, device="cpu")


@pytest.mark.parametrize("axis", ["n", "num_rows"])
@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("fused_dit")])
def test_layernorms_of_more_rows_than_the_kernel_counts(name, axis):
    """Of no elements, which are never read, but of which the grid would be as large."""
    op = OPS[name]
    for count in (2**31 - 1, 2**31):
        sizes = {"n": 0, "num_rows": 0, "3072": 3072, axis: count}
        given = {
            arg.name: far(*(sizes[size] for size in arg.axes.split()),
                          dtype={"T": "bfloat16"}.get(arg.dtype, arg.dtype))
            for arg in op.row.given if isinstance(arg, Tensor) and not arg.optional
        }  # fmt: skip
        if count < 2**31:
            op(**given)
            continue
        with pytest.raises(ArgumentError, match=f"{axis} = 2147483648 of at most 2147483647"):
            op(**given)


def test_a_video_of_more_tokens_than_the_kernel_counts():
    """Refused for its number; one less, for its first other fault."""
    weights = {"q_weight": far(1, 64), "k_weight": far(1, 64)}
    heads = dict.fromkeys(("num_heads_q", "num_heads_k", "num_heads_v"))
    wrong = VIDEO | dict(zip(CHANNELS, (24, 20, 20), strict=True)) | {"seq_len": 10**6}
    for n, argument in ((2**31, "qkv_in"), (2**31 - 1, "seq_len")):
        outs = {f"{name}_out": far(n, 1, 64) for name in "qkv"}
        with pytest.raises(ArgumentError) as caught:
            OP(far(n, 3, 64), **weights, **outs, num_tokens=None, **heads, **wrong)
        assert caught.value.argument == argument
    assert "seq_len = ppf * pph * ppw" in str(caught.value)


def test_stream_is_allowed_and_unused_on_the_cpu(rng):
    case = make_case(OPS["rmsnorm"].row, {"n": 4, "h": 32}, {"T": "float16"}, rng)
    fi_ffi.rmsnorm(**case.arrays, stream=0)
    assert case.error("out", case.arrays["out"])[1] <= 1
