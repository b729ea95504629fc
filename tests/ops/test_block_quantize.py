"""Quantising in blocks: the references on the CPU, and kernels where a GPU is one of theirs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, needs

DEQUANT, QUANTIZE, FP4, CACHE = (
    OPS[name] for name in ("nvfp4_kv_dequant", "mxfp8_quantize", "fp4_quantize", "nvfp4_kv_quant")
)


def rows_of(rng, n: int, k: int, dtype: str = "bfloat16", op: Op = QUANTIZE, **more: Any) -> Case:
    return make_case(op.row, {"n": n, "k": k}, {"T": dtype}, rng, **more)


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("dtype", QUANTIZE.row.dtypes["T"])
def test_rows_of_mxfp8(dtype, layout, machine, rng):
    needs(QUANTIZE, machine)
    for n, k, alignment in ((1, 32, 32), (7, 96, 128), (130, 64, 32), (3, 1024, 96), (9, 160, 64)):
        numbers = {"sfSwizzleLayout": layout, "alignment": alignment}
        assert check_on(machine, rows_of(rng, n, k, dtype, **numbers)) == 0


def test_a_power_of_2_is_no_more_than_needed(machine):
    """448 of it is 448, and what is just larger takes the next power."""
    needs(QUANTIZE, machine)
    x = np.zeros((1, 96), ml_dtypes.bfloat16)
    x[0, 0], x[0, 32], x[0, 64] = 448 * 2.0**5, -449 * 2.0**5, 2.0**-3
    x[0, 33] = -452 * 2.0**5
    made = rows_of(np.random.default_rng(), 1, 96, tables={"input": x}, sfSwizzleLayout=2)
    assert check_on(machine, made) == 0
    QUANTIZE(**made.arrays, **made.scalars)
    assert made.arrays["scaleFP8SF"].tolist() == [127 + 5, 127 + 6, 127 - 11]
    assert made.arrays["valMxFP8"][0, [0, 64]].astype(float).tolist() == [448, 256]


def test_nothing_but_zeros(machine):
    needs(QUANTIZE, machine)
    x = np.zeros((2, 64), np.float16)
    made = rows_of(np.random.default_rng(), 2, 64, "float16", tables={"input": x})
    QUANTIZE(**made.arrays, **made.scalars)
    assert not made.arrays["valMxFP8"].view(np.uint8).any()
    assert not made.arrays["scaleFP8SF"].any()


LAYOUTS = [(True, False), (True, True), (False, False)]


def rows_of_fp4(rng, n: int, k: int, dtype: str = "bfloat16", op: Op = FP4, **numbers: Any) -> Case:
    without = ("globalScale",) if numbers.get("sfUseUE8M0") else ()
    sizes = {"n": n, "half": k // 2}
    return make_case(op.row, sizes, {"T": dtype}, rng, without=without, **numbers)


@pytest.mark.parametrize("numbers", [{}, {"sfUseUE8M0": True}, {"isGlobalScaleInversed": True}])
@pytest.mark.parametrize(("is_swizzled", "is_8x4"), LAYOUTS)
@pytest.mark.parametrize("dtype", FP4.row.dtypes["T"])
def test_rows_of_fp4(dtype, is_swizzled, is_8x4, numbers, machine, rng):
    needs(FP4, machine)
    numbers = numbers | {"isSfSwizzledLayout": is_swizzled, "isSf8x4Layout": is_8x4}
    tables = {"globalScale": np.array([0.02])} if "isGlobalScaleInversed" in numbers else {}
    for n, k in ((1, 32), (7, 96), (130, 64), (3, 1024)):
        assert check_on(machine, rows_of_fp4(rng, n, k, dtype, **numbers, tables=tables)) == 0


def test_a_row_of_fp4_by_hand(rng):
    """The largest is 6 of its scale, and halves are rounded to even."""
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [6, 5, 3.5, 2.5, 1.75, 0.25, 0.75, -0.25, -6]
    x[0, 16] = 0.75
    tables = {"input": x, "globalScale": np.array([1.0])}
    made = rows_of_fp4(rng, 1, 32, isSfSwizzledLayout=False, tables=tables)
    FP4(**made.arrays, **made.scalars)
    codes = made.arrays["valueE2M1"][0]
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    assert halves[:9].tolist() == [7, 6, 6, 4, 4, 0, 2, 8, 15]
    assert halves[16] == 7
    assert made.arrays["scaleFP8SF"].view(ml_dtypes.float8_e4m3fn).astype(float).tolist() == [
        1, 0.125,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", CACHE.row.dtypes["T"])
def test_caches_to_4_bits_and_back(dtype, machine, rng):
    needs(CACHE, machine)
    for n, blocks in ((1, 1), (5, 3), (2, 129)):
        made = make_case(CACHE.row, {"n": n, "blocks": blocks}, {"T": dtype}, rng)
        assert check_on(machine, made) == 0
        CACHE(**made.arrays)
        back = np.zeros((n, 16 * blocks), made.arrays["input"].dtype)
        quantised = [made.arrays[name] for name in ("fp4_output", "block_scales", "global_scale")]
        DEQUANT(*quantised, back)
        x = made.arrays["input"].astype(float).reshape(n, blocks, 16)
        error = np.abs(back.astype(float).reshape(x.shape) - x).max(axis=-1)
        assert (error <= np.abs(x).max(axis=-1) / 5).all()


@pytest.mark.parametrize(
    ("numbers", "argument"),
    [
        ({"sfVecSize": 32}, "sfVecSize"),
        ({"sfVecSize": 16, "sfUseUE8M0": True}, "sfVecSize"),
        ({"globalScale": None}, "globalScale"),
        ({"isSfSwizzledLayout": False}, "scaleFP8SF"),
        ({"isSf8x4Layout": True}, "scaleFP8SF"),
    ],
)
def test_numbers_of_fp4_that_do_not_fit(numbers, argument, rng):
    made = rows_of_fp4(rng, 3, 64)
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        FP4(**(made.arrays | made.scalars | numbers))
    assert caught.value.argument == argument


def test_rows_of_fp4_that_are_no_whole_blocks():
    x, values, scales = (
        fi_ffi.TensorDesc(at, shape, dtype, device="cpu")
        for at, shape, dtype in (
            (4096, (3, 80), "float16"), (8192, (3, 40), "uint8"), (12288, (512,), "uint8")
        )
    )  # fmt: skip
    with pytest.raises(fi_ffi.ArgumentError, match="whole blocks of sfVecSize"):
        FP4(x, None, values, scales, 32, True)


@pytest.mark.parametrize("release", ["0.6.3", "0.6.13", "0.7.2.post1"])
def test_forms_of_fp4_quantize(release, rng):
    op = Op(next(row for row in FP4.rows if fits(row, release)))
    made = rows_of_fp4(rng, 5, 96, op=op)
    op(**made.arrays, **made.scalars)
    assert max(made.error(name, made.arrays[name])[1] for name in made.expected) == 0


def test_a_wrong_element_or_scale_is_seen(rng):
    made = rows_of(rng, 3, 64)
    QUANTIZE(**made.arrays, **made.scalars)
    values, scales = made.arrays["valMxFP8"], made.arrays["scaleFP8SF"]
    assert made.error("valMxFP8", values)[1] == made.error("scaleFP8SF", scales)[1] == 0
    codes = values.view(np.uint8).copy()
    codes[1, 5] ^= 2  # not the neighbour, which a tie may be rounded to
    assert made.error("valMxFP8", codes.view(values.dtype))[1] > 1
    assert made.error("scaleFP8SF", scales + (scales > 0))[1] > 1
    made = rows_of_fp4(rng, 3, 64)
    FP4(**made.arrays, **made.scalars)
    values, scales = made.arrays["valueE2M1"], made.arrays["scaleFP8SF"]
    assert made.error("valueE2M1", values)[1] == made.error("scaleFP8SF", scales)[1] == 0
    assert made.error("valueE2M1", values ^ (np.arange(32) == 5).astype(np.uint8))[1] > 1
    assert made.error("scaleFP8SF", scales + (scales > 0))[1] > 1


@pytest.mark.parametrize(
    ("sizes", "numbers", "argument"),
    [
        ({"padded_k": 64}, {"alignment": 128}, "valMxFP8"),
        ({"padded_k": 96}, {}, "valMxFP8"),
        ({"num_scales": 511}, {}, "scaleFP8SF"),
        ({}, {"sfSwizzleLayout": 2}, "scaleFP8SF"),
        ({}, {"sfSwizzleLayout": 3}, "sfSwizzleLayout"),
        ({}, {"alignment": 48}, "alignment"),
    ],
)
def test_sizes_that_do_not_fit(sizes, numbers, argument):
    sizes = {"padded_k": 64, "num_scales": 512} | sizes
    x, values = (
        fi_ffi.TensorDesc(at, (5, n), dtype, device="cpu")
        for at, n, dtype in ((4096, 64, "float16"), (8192, sizes["padded_k"], "float8_e4m3fn"))
    )
    scales = fi_ffi.TensorDesc(12288, (sizes["num_scales"],), "uint8", device="cpu")
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        QUANTIZE(x, values, scales, **numbers)
    assert caught.value.argument == argument


def test_the_form_of_older_releases(rng):
    older = next(row for row in QUANTIZE.rows if fits(row, "0.6.3"))
    op = Op(older)
    for is_swizzled in (True, False):
        made = rows_of(rng, 5, 96, op=op, isSfSwizzledLayout=is_swizzled)
        op(**made.arrays, **made.scalars)
        for name in made.expected:
            assert made.error(name, made.arrays[name])[1] == 0
