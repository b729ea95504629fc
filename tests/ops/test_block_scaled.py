"""Blocks with a scale each, against their formats' definitions: on the CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.cli.cases import Case
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.providers import entry_for

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed, needs

DEQUANT, TILES, ROWS_AGAIN, QUANTIZE, FP4, CACHE = (
    OPS[name]
    for name in (
        "nvfp4_kv_dequant",
        "block_scale_interleave",
        "block_scale_interleave_reverse",
        "mxfp8_quantize",
        "fp4_quantize",
        "nvfp4_kv_quant",
    )
)


def of_bits(rng, n: int, blocks: int, output="bfloat16", scales="uint8", **more: Any) -> Case:
    return make_case(
        DEQUANT.row, {"n": n, "blocks": blocks}, {"T": output, "S": scales}, rng, **more
    )


@pytest.mark.parametrize("scales", DEQUANT.row.dtypes["S"])
@pytest.mark.parametrize("output", DEQUANT.row.dtypes["T"])
def test_caches(output, scales, machine, rng):
    """From one block to more than a thread block has at a time, 2048 elements."""
    for n, blocks in ((1, 1), (7, 3), (3, 8), (5, 127), (2, 128), (3, 129), (2, 1000), (700, 8)):
        scale = {"global_scale": np.exp(rng.uniform(-6, -2, 1))}
        assert check_on(machine, of_bits(rng, n, blocks, output, scales, tables=scale)) <= 1


def test_every_byte_and_every_scale(machine, rng):
    """All pairs of 4-bit numbers with all scales; a NaN of a scale makes NaN of its block."""
    data = np.arange(256).repeat(8).reshape(1, -1).repeat(256, axis=0)
    scales = np.arange(256).reshape(-1, 1).repeat(256, axis=1)
    made = of_bits(rng, 256, 256, tables={"fp4_data": data, "block_scales": scales,
                                          "global_scale": np.array([0.25])})  # fmt: skip
    value, _ = made.expected["output"]

    def judge(got: np.ndarray) -> tuple[float, float]:
        found = got.astype(np.float64)
        return (0.0, 0.0 if np.array_equal(found, value, equal_nan=True) else np.inf)

    assert np.isnan(value[[127, 255]]).all() and np.isnan(value).sum() == 2 * 4096
    made.expected["output"] = judge
    assert check_on(machine, made) == 0


def test_the_longest_rows(machine, rng):
    """As many scales as a thread block's shared memory has room for, and one more."""
    most = 48 * 1024 - 4
    assert check_on(machine, of_bits(rng, 2, most)) <= 1
    with pytest.raises(fi_ffi.ArgumentError, match=f"blocks = {most + 1} of at most {most}"):
        DEQUANT(**of_bits(rng, 1, most + 1).arrays)


def test_no_rows(machine, rng):
    assert check_on(machine, of_bits(rng, 0, 4)) == 0


def matrices(rng, n: int, rows: int, cols: int, dtype: str = "uint8") -> Case:
    return make_case(TILES.row, {"n": n, "rows": rows, "cols": cols}, {"T": dtype}, rng)


@pytest.mark.parametrize("dtype", TILES.row.dtypes["T"])
def test_tiles(dtype, machine, rng):
    needs(TILES, machine)
    for n, rows, cols in (
        (1, 1, 1), (2, 128, 4), (3, 129, 5), (1, 31, 3), (2, 300, 64), (1, 1000, 1030), (40, 7, 9),
    ):  # fmt: skip
        assert check_on(machine, matrices(rng, n, rows, cols, dtype)) == 0


def test_a_tile_by_hand():
    scales = (np.arange(128)[:, None] * 2 + np.arange(4) // 2).astype(np.uint8).reshape(1, 128, 4)
    tiled = np.full(512, 0xFF, np.uint8)
    fi_ffi.block_scale_interleave(scales, tiled)
    for row in range(128):
        for col in range(4):
            assert tiled[16 * (row % 32) + 4 * (row // 32) + col] == scales[0, row, col]


def test_tiles_and_back(machine, rng):
    needs(ROWS_AGAIN, machine)
    for n, rows, cols in ((1, 128, 4), (3, 256, 12), (2, 1024, 1028)):
        sizes = {"n": n, "rows": rows, "cols": cols}
        assert check_on(machine, make_case(ROWS_AGAIN.row, sizes, {}, rng)) == 0
    made = matrices(rng, 2, 256, 8)
    back = np.zeros_like(made.arrays["blockScale"])
    TILES(**made.arrays)
    ROWS_AGAIN(made.arrays["interleavedBlockScale"].reshape(back.shape), back)
    assert (back == made.arrays["blockScale"]).all()


def test_recorded_and_replayed(machine, rng):
    assert check_replayed(machine, of_bits(rng, 50, 8)) <= 1
    needs(TILES, machine)
    assert check_replayed(machine, matrices(rng, 2, 300, 20)) == 0


@pytest.mark.parametrize("wrong", [0, 511, 513, 1024])
def test_tiles_that_are_not_whole(wrong):
    with pytest.raises(fi_ffi.ArgumentError, match="whole tiles of 128 rows and 4 columns"):
        fi_ffi.block_scale_interleave(np.zeros((1, 100, 3), np.uint8), np.zeros(wrong, np.uint8))
    for rows, cols in ((100, 4), (128, 3)):
        tiled = np.zeros((1, rows, cols), np.uint8)
        with pytest.raises(fi_ffi.ArgumentError, match="to be a multiple of"):
            fi_ffi.block_scale_interleave_reverse(tiled, tiled.copy())


@pytest.mark.parametrize(
    ("op", "able"),
    [
        (QUANTIZE, (10, 11, 12)),
        (CACHE, (10, 11, 12)),
        (FP4, (10,)),
        (TILES, (9,)),
        (ROWS_AGAIN, (9,)),
    ],
)
def test_gpus_that_a_kernel_is_not_for(op, able, monkeypatch):
    """No such GPU is here: the machine is said to have one."""
    for major in {8, 9, 10, 11, 12} - {*able}:
        monkeypatch.setattr(of_loader, "capability", lambda _, major=major: (major, 0))
        with pytest.raises(fi_ffi.ArchitectureError, match=rf"cuda:0 has {major}\.0"):
            entry_for(op.row, parse_device("cuda:0"))
