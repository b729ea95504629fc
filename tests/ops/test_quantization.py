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
