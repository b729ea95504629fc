"""4-bit weights and their scales in the order of Hopper's kernels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.reference import moe_weights

from tests.helpers.moe_layers import BF16, F16

each_type = pytest.mark.parametrize("quant_type", ["fp4", "int4"])


def random_weights(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def as_the_kernel_does(weight: np.ndarray, quant_type: str) -> np.ndarray:
    """moe_gemm_mixed_utils.cu, thread by thread: index arithmetic on flat memory."""
    rows, packed = weight.shape
    columns = 2 * packed
    source = weight.reshape(-1)
    if quant_type == "int4":
        source = source.view(np.uint16)
    target = np.zeros_like(source)
    width = 32 if quant_type == "fp4" else 16
    units = packed // source.itemsize
    for block in range(rows // 2):
        for part in range(columns // 64):
            for lane in range(width):
                row = block // 8 * 16 + block % 8
                a = source[row * units + part * width + lane]
                b = source[(row + 8) * units + part * width + lane]
                if quant_type == "fp4":
                    a, b = (a & 0x0F) | (b & 0x0F) << 4, (b & 0xF0) | (a & 0xF0) >> 4
                    to_row = row + lane // 8 % 2 * 8
                    to = lane // 16 * 16 + lane % 4 * 4 + lane % 8 // 4 * 2
                else:
                    to_row = row + lane % 8 // 4 * 8
                    to = lane // 8 * 8 + lane % 4 * 2
                target[to_row * units + part * width + to] = a
                target[to_row * units + part * width + to + 1] = b
    return target.view(np.uint8).reshape(rows, packed)


@each_type
def test_the_order_is_the_kernels(quant_type, rng):
    weight = random_weights(rng, 3, 48, 96)
    found = np.full_like(weight, 0xFF)
    fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(weight, found, quant_type)
    for one, expected in zip(found, weight, strict=True):
        assert (one == as_the_kernel_does(expected, quant_type)).all()


@each_type
def test_it_is_a_permutation(quant_type, rng):
    assert sorted(moe_weights.order(quant_type)) == [*range(16 * 64)]
    weight = random_weights(rng, 2, 32, 64)
    there = moe_weights.interleave(weight, quant_type)
    assert (moe_weights.deinterleave(there, quant_type) == weight).all()
    assert (there != weight).any()


@each_type
def test_no_experts(quant_type):
    empty = np.zeros((0, 16, 32), np.uint8)
    interleave = fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm
    assert interleave(empty, empty.copy(), quant_type) is None


def test_values_of_codes(rng):
    packed = random_weights(rng, 2, 4, 64)
    codes = moe_weights.codes(packed)
    assert (moe_weights.pack(codes) == packed).all()
    exponents = rng.integers(0, 256, (4, 4), dtype=np.uint8)
    found = moe_weights.mxfp4(packed[0], exponents)
    value = codes[0].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    expected = value * np.repeat(scale, 32, axis=-1)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    assert same.all()
    groups = rng.standard_normal((4, 1)).astype(BF16)
    found = moe_weights.int4(packed[1], groups)
    expected = codes[1].view(ml_dtypes.int4).astype(np.float32) * groups.astype(np.float32)
    assert (found == expected).all()


@pytest.mark.parametrize(("size", "groups", "factor"), [(32, 8, 4), (128, 8, 4), (128, 6, 2),
                                                        (128, 5, 1)])  # fmt: skip
def test_scales(size, groups, factor, rng):
    dtype = np.uint8 if size == 32 else BF16
    scales = rng.integers(0, 255, (3, 16, groups)).astype(dtype)
    found = np.zeros((3, groups // factor, 16 * factor), dtype)
    fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(scales, found, size)
    for expert in range(3):
        for row in range(16):
            for group in range(groups):
                place = found[expert, group // factor, row * factor + group % factor]
                assert place == scales[expert, row, group]
    assert (moe_weights.deinterleave_scales(found, 16) == scales).all()


WEIGHT, SCALES = np.zeros((2, 32, 64), np.uint8), np.zeros((2, 16, 8), np.uint8)
OUT, READONLY = np.zeros((2, 2, 64), np.uint8), WEIGHT.copy()
READONLY.setflags(write=False)
# The least that 32 bits do not count.
HUGE = fi_ffi.TensorDesc(4096, (1, 65536, 16384), "uint8", device="cpu")


def on_gpu(array: np.ndarray) -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(4096, array.shape, "uint8")


@pytest.mark.parametrize(
    ("weight", "target", "more", "argument"),
    [
        (WEIGHT.astype("i1"), WEIGHT.copy(), {}, "weight"),
        (WEIGHT[0], WEIGHT.copy(), {}, "weight"),
        (WEIGHT[:, :24].copy(), WEIGHT[:, :24].copy(), {}, "weight"),
        (WEIGHT[..., :48].copy(), WEIGHT[..., :48].copy(), {}, "weight"),
        (WEIGHT[..., ::2], WEIGHT[..., ::2].copy(), {}, "weight"),
        (WEIGHT, WEIGHT.astype("f4"), {}, "weight_interleaved"),
        (WEIGHT, WEIGHT[:1].copy(), {}, "weight_interleaved"),
        (WEIGHT, WEIGHT, {}, "weight_interleaved"),
        (WEIGHT, on_gpu(WEIGHT), {}, "weight_interleaved"),
        (WEIGHT, READONLY, {}, "weight_interleaved"),
        (WEIGHT, WEIGHT.copy(), {"quant_type": "fp8"}, "quant_type"),
        (HUGE, HUGE.at(2**40), {}, "weight"),
        (None, WEIGHT, {}, TypeError), (WEIGHT, 3, {}, TypeError),
        (WEIGHT, WEIGHT.copy(), {"quant_type": 1}, TypeError),
    ],
)  # fmt: skip
def test_what_weights_must_be(weight, target, more, argument):
    call = fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm
    if argument is TypeError:
        with pytest.raises(fi_ffi.ArgumentTypeError):
            call(weight, target, **more)
        return
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        call(weight, target, **more)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("scales", "target", "size", "argument"),
    [
        (SCALES, OUT.copy(), 64, "group_size"), (SCALES, OUT.copy(), 0, "group_size"),
        (SCALES.astype(F16), OUT.copy(), 32, "scales"), (SCALES, OUT.copy(), 128, "scales"),
        (SCALES[0], OUT.copy(), 32, "scales"), (SCALES[..., :6].copy(), OUT.copy(), 32, "scales"),
        (SCALES, OUT[:, :1].copy(), 32, "scales_interleaved"),
        (SCALES, OUT.astype("i1"), 32, "scales_interleaved"),
        (on_gpu(SCALES), OUT, 32, "scales"), (SCALES, on_gpu(OUT), 32, "scales_interleaved"),
    ],
)  # fmt: skip
def test_what_scales_must_be(scales, target, size, argument):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(scales, target, size)
    assert caught.value.argument == argument
