"""Bits, and blocks with a scale each, by hand: on the CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, needs

DEQUANT, QUANTIZE, FP4 = (
    OPS[name] for name in ("nvfp4_kv_dequant", "mxfp8_quantize", "fp4_quantize")
)
WHOLE, SEGMENTS = OPS["packbits"].row, OPS["segment_packbits"].row
ORDERS = ("big", "little")


def rows_of(rng, n: int, k: int, dtype: str = "bfloat16", **more: Any) -> Case:
    return make_case(QUANTIZE.row, {"n": n, "k": k}, {"T": dtype}, rng, **more)


@pytest.mark.parametrize("order", ORDERS)
def test_many_bits(order, machine, rng):
    n = 2**31 + 1003 if machine.is_gpu else 2**20 + 1003  # more than an int counts
    x = rng.integers(0, 2, 1009).astype(bool)
    bits = np.resize(x, n)
    packed = np.packbits(bits, bitorder=order)
    machine.need(WHOLE.module)
    there, y = machine.place(bits), machine.place(np.zeros_like(packed))
    fi_ffi.packbits(there.desc(), order, y.desc(), stream=machine.stream)
    assert (y.get() == packed).all() and y.intact()


@pytest.mark.parametrize("order", ORDERS)
def test_segments_in_any_place(order, machine, rng):
    """In another order, and with bytes between them, which stay as they are."""
    lengths = np.array([13, 0, 64, 7, 300])
    needs = -(-lengths // 8)
    places = np.array([40, 0, 100, 20, 50, 0], np.int32)
    assert len({at for p, n in zip(places, needs, strict=False) for at in range(p, p + n)}) == sum(
        needs
    )
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tables = {"input_indptr": starts, "output_indptr": places}
    made = make_case(SEGMENTS, {"n": int(starts[-1]), "b": 5}, {}, rng, tables, bitorder=order)
    before, after = made.arrays["y"], made.expected["y"][0]
    assert len(after) == 111 and (after[26:40] == before[26:40]).all()
    assert check_on(machine, made) == 0


@pytest.mark.parametrize(
    ("starts", "places"),
    [([0, 9], [0, 1]), ([0, 5], [2, 3]), ([0, -1], [0, 1]), ([3, 1], [0, 1]), ([0, 5], [-1, 0])],
)
def test_segments_that_the_reference_refuses(starts, places):
    """On a GPU they would be read and written past the ends."""
    x, y = np.zeros(8, bool), np.zeros(2, np.uint8)
    with pytest.raises(fi_ffi.ArgumentError, match="segment_packbits: argument `.*put_indptr`"):
        fi_ffi.segment_packbits(x, *(np.array(a, np.int32) for a in (starts, places)), "big", y)


@pytest.mark.parametrize("indptr", [[], [1, 2], [0, 3, 2], [[0, 1]], None, "0", [0.0], [0, 2**31]])
def test_starts_that_are_refused(indptr):
    with pytest.raises(fi_ffi.ArgumentError, match="packed_indptr: argument `indptr`"):
        fi_ffi.packed_indptr(indptr)


def test_starts_of_bytes(rng):
    lengths = rng.integers(0, 50, 200)
    indptr = fi_ffi.packed_indptr(np.concatenate([[0], np.cumsum(lengths)]))
    assert indptr.dtype == np.int32 and indptr[0] == 0
    assert (np.diff(indptr) == (lengths + 7) // 8).all()


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


def test_a_row_of_fp4_by_hand(rng):
    """The largest is 6 of its scale, and halves are rounded to even."""
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [6, 5, 3.5, 2.5, 1.75, 0.25, 0.75, -0.25, -6]
    x[0, 16] = 0.75
    tables = {"input": x, "globalScale": np.array([1.0])}
    sizes, more = {"n": 1, "half": 16}, {"isSfSwizzledLayout": False}
    made = make_case(FP4.row, sizes, {"T": "bfloat16"}, rng, tables, **more)
    FP4(**made.arrays, **made.scalars)
    codes = made.arrays["valueE2M1"][0]
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    assert halves[:9].tolist() == [7, 6, 6, 4, 4, 0, 2, 8, 15]
    assert halves[16] == 7
    assert made.arrays["scaleFP8SF"].view(ml_dtypes.float8_e4m3fn).astype(float).tolist() == [
        1, 0.125,
    ]  # fmt: skip


def test_every_byte_and_every_scale(machine, rng):
    """All pairs of 4-bit numbers with all scales; a NaN of a scale makes NaN of its block."""
    data = np.arange(256).repeat(8).reshape(1, -1).repeat(256, axis=0)
    scales = np.arange(256).reshape(-1, 1).repeat(256, axis=1)
    tables = {"fp4_data": data, "block_scales": scales, "global_scale": np.array([0.25])}
    dtypes = {"T": "bfloat16", "S": "uint8"}
    made = make_case(DEQUANT.row, {"n": 256, "blocks": 256}, dtypes, rng, tables)
    value, _ = made.expected["output"]

    def judge(got: np.ndarray) -> tuple[float, float]:
        found = got.astype(np.float64)
        return (0.0, 0.0 if np.array_equal(found, value, equal_nan=True) else np.inf)

    assert np.isnan(value[[127, 255]]).all() and np.isnan(value).sum() == 2 * 4096
    made.expected["output"] = judge
    assert check_on(machine, made) == 0


# Numbers at the ends of what a kernel computes in, as it takes them one after another.

LEAST = 2.0**-126  # of float32, the least that is not flushed to 0


def flushed(x: np.ndarray) -> np.ndarray:
    """In float32, of which fast arithmetic has no subnormal numbers."""
    x = np.float32(x)
    return np.where(np.abs(x) < np.float32(LEAST), np.float32(0), x)


def reciprocal(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return flushed(np.float32(1) / flushed(x))


def byte_of_power(x: np.ndarray) -> np.ndarray:
    """`cvt.rp.satfinite.ue8m0x2.f32`: the exponent's bits, one more if there is a mantissa."""
    word = np.float32(x).view(np.uint32)
    code = np.minimum(np.int64(word >> 23) + ((word & 0x7FFFFF) != 0), 254)
    return np.where(np.isnan(x), 255, code)


def by_steps(x: np.ndarray, size: int, largest: float, is_fp4: bool) -> tuple[np.ndarray, ...]:
    """`cvt_warp_fp16_to_mxfp8`, and `cvt_warp_fp16_to_fp4` with powers, of quantization_utils.cuh:
    the elements before their conversion, and the scales."""
    blocks = np.float32(x).reshape(len(x), -1, size)
    most = flushed(np.fmax.reduce(np.abs(blocks), axis=-1))
    wanted = flushed(most * reciprocal(np.float32(largest)))
    codes = byte_of_power(wanted)
    power = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
    scale = np.where(flushed(power) == 0, np.float32(0), reciprocal(power))
    if is_fp4:
        scale = np.where(wanted == 0, np.float32(0), flushed(np.ldexp(1.0, 127 - codes)))
    return flushed(flushed(blocks) * scale[..., None]).reshape(x.shape), codes


def at_the_ends(rng, n: int, k: int, size: int) -> np.ndarray:
    """Rows of bfloat16: blocks of every exponent, and blocks of what is no number and the like."""
    x = rng.standard_normal((n, k)) * 2.0 ** rng.integers(-120, 120, (n, k // size)).repeat(size, 1)
    blocks = x.reshape(n, -1, size)
    special = [np.inf, -np.inf, np.nan, 1e-36, 1e-39, -1e-40, 0.0, -0.0, LEAST, 448 * LEAST, 3e38]
    for value in special:
        row, block = rng.integers(0, blocks.shape[:2])
        blocks[row, block] = value
        row, block = rng.integers(0, blocks.shape[:2])
        blocks[row, block, rng.integers(0, size, 3)] = value
        blocks[row, block, 0] = 0.0
    return x.astype(ml_dtypes.bfloat16)


def on_cpu(case: Case) -> dict[str, np.ndarray]:
    OPS[case.row.name](**case.arrays, **case.scalars)
    return {name: case.arrays[name] for name in case.expected}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mxfp8_at_the_ends_of_numbers(rng):
    """Its kernel runs on newer GPUs only: what its source does, step by step."""
    x = at_the_ends(rng, 40, 256, 32)
    tables = {"input": x}
    made = make_case(QUANTIZE.row, {"n": 40, "k": 256}, {"T": "bfloat16"}, rng, tables,
                     sfSwizzleLayout=2)  # fmt: skip
    elements, codes = by_steps(x, 32, 448, False)
    expected = {
        "valMxFP8": np.clip(elements, -448, 448).astype(ml_dtypes.float8_e4m3fn),
        "scaleFP8SF": codes.reshape(-1).astype(np.uint8),
    }
    got = on_cpu(made)
    for name, value in expected.items():
        assert made.error(name, value)[1] <= 1
        assert made.error(name, got[name])[1] <= 1
    is_nan = np.isnan(expected["valMxFP8"].astype(float))
    assert is_nan.any() and (np.isnan(got["valMxFP8"].astype(float)) == is_nan).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fp4_of_powers_at_the_ends_of_numbers(rng):
    x = at_the_ends(rng, 40, 256, 32)
    made = make_case(FP4.row, {"n": 40, "half": 128}, {"T": "bfloat16"}, rng, {"input": x},
                     sfUseUE8M0=True, sfVecSize=32, isSfSwizzledLayout=False,
                     without=("globalScale",))  # fmt: skip
    elements, codes = by_steps(x, 32, 6, True)
    # NaN becomes the greatest (cuda_fp4.h).
    elements = np.clip(np.where(np.isnan(elements), 6, elements), -6, 6)
    halves = elements.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(40, -1, 2)
    expected = {"valueE2M1": halves[..., 0] + 16 * halves[..., 1],
                "scaleFP8SF": codes.reshape(-1).astype(np.uint8)}  # fmt: skip
    got = on_cpu(made)
    for name, value in expected.items():
        assert made.error(name, value)[1] <= 1
        assert made.error(name, got[name])[1] <= 1


# A block's elements, and what comes out: its scale's byte, and those of the elements.
BLOCKS_BY_HAND = {
    "infinities": ([np.inf, -np.inf], 254, [0x7F, 0x7F]),
    "one infinity": ([np.inf, 1.0, 3e38, 0.0], 254, [0x7F, 0, 0, 0]),
    "flushed": ([1e-36, -1e-36, 0.0], 0, [0, 0x80, 0]),
    "not flushed": ([448 * LEAST, 0.0], 1, [0x7E, 0]),
    "NaN": ([np.nan], 255, [0x7F]),
    "a NaN": ([np.nan, 448.0, -224.0], 127, [0x7F, 0x7E, 0xF6]),
    "zeros": ([0.0, -0.0], 0, [0, 0x80]),
}


@pytest.mark.parametrize("block", BLOCKS_BY_HAND)
def test_a_block_of_what_is_no_usual_number(block, rng):
    values, scale, elements = BLOCKS_BY_HAND[block]
    x = np.resize(np.array(values), (1, 32)).astype(ml_dtypes.bfloat16)
    made = make_case(QUANTIZE.row, {"n": 1, "k": 32}, {"T": "bfloat16"}, rng, {"input": x},
                     sfSwizzleLayout=2)  # fmt: skip
    got = on_cpu(made)
    assert got["scaleFP8SF"].tolist() == [scale]
    expected = np.resize(np.array(elements, np.uint8), 32)
    assert (got["valMxFP8"].view(np.uint8)[0] == expected).all()


def test_zeros_beside_a_number_too_small_for_a_scale(rng):
    """The kernel multiplies them by infinity, and NaN becomes the greatest (cuda_fp4.h)."""
    x = np.zeros((2, 32), ml_dtypes.bfloat16)
    x[0, [0, 16]] = [1e-4, -1e-4]
    made = make_case(FP4.row, {"n": 2, "half": 16}, {"T": "bfloat16"}, rng,
                     {"input": x, "globalScale": np.ones(1)}, isSfSwizzledLayout=False)  # fmt: skip
    got = on_cpu(made)
    assert not got["scaleFP8SF"].any()
    assert got["valueE2M1"][0].tolist() == [0x77] * 8 + [0x7F] + [0x77] * 7
    assert not got["valueE2M1"][1].any()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_scale_of_zero_for_all_numbers(rng):
    """The kernel divides by it: scales are the greatest, or NaN for zeros; elements saturate."""
    row = OPS["nvfp4_kv_quant"].row
    x = np.zeros((2, 32), ml_dtypes.bfloat16)
    x[0, :16], x[0, 3], x[1, 16:] = 1.0, -1.0, 2.0
    made = make_case(row, {"n": 2, "blocks": 2}, {"T": "bfloat16"}, rng,
                     {"input": x, "global_scale": np.zeros(1)})  # fmt: skip
    got = on_cpu(made)
    assert got["block_scales"].tolist() == [[0x7E, 0x7F], [0x7F, 0x7E]]
    halves = [0x77, 0xF7] + [0x77] * 6
    assert got["fp4_output"].tolist() == [halves + [0] * 8, [0] * 8 + [0x77] * 8]
