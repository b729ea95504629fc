"""4-bit weights of the releases that fold their scales into blocks of 64 rows and 128 columns."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.reference import moe_weights

from tests.helpers import moe_layers
from tests.helpers.moe_layers import BF16, F16, a, make, refused

FOLDED = ["0.6.16", "0.6.16.post1", "0.6.16.post2", "0.6.18", "0.7.2.post1"]
IN_ROWS = ["0.6.13", "0.6.15", "0.6.16.post3", "0.6.16.post4", "0.6.17"]
each_mode = pytest.mark.parametrize(
    ("mode", "dtype"), [("mxfp4", BF16), ("int4", F16), ("int4", BF16)]
)
# Where moe_gemm_mixed_utils.cu puts fields of a word of four bytes: a mask, and how far up.
FIELDS = (
    (0x80, 24), (0x70, 18), (0x08, 12), (0x07, 6),
    (0x8000, 13), (0x7000, 7), (0x0800, 1), (0x0700, -5),
    (0x800000, 2), (0x700000, -4), (0x080000, -10), (0x070000, -16),
    (0x80000000, -1), (0x10000000, 1), (0x60000000, -3), (0x08000000, -13), (0x01000000, -11),
    (0x06000000, -15),
)  # fmt: skip


@pytest.fixture
def folded(put_release) -> None:
    put_release("0.6.18")


def shifted(word: int) -> int:
    moved = (((word & mask) << by) if by > 0 else ((word & mask) >> -by) for mask, by in FIELDS)
    return sum(moved)


def as_the_kernel_does(weight: np.ndarray) -> np.ndarray:
    """interleave_fp4_weights_for_sm90_mixed_gemm_kernel, lane by lane."""
    rows, packed = weight.shape
    found = np.zeros_like(weight)
    for block in range(rows // 2):
        row = block // 8 * 16 + block % 8
        for part in range(packed // 32):
            for lane in range(16):
                column = part * 32 + lane // 4 * 8 + lane % 4
                four = [weight[row, column], weight[row + 8, column],
                        weight[row, column + 4], weight[row + 8, column + 4]]  # fmt: skip
                word = shifted(int.from_bytes(bytes(four), "little"))
                to = part * 32 + lane // 8 * 16 + lane % 4 * 4
                target = found[row + lane // 4 % 2 * 8]
                target[to : to + 4] = np.frombuffer(word.to_bytes(4, "little"), np.uint8)
    return found


def test_the_order_is_the_kernels(folded, rng):
    weight = rng.integers(0, 256, (2, 48, 96), dtype=np.uint8)
    found = np.full_like(weight, 0xFF)
    fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(weight, found)
    for one, expected in zip(found, weight, strict=True):
        assert (one == as_the_kernel_does(expected)).all()
    assert (moe_weights.deinterleave(found, "fp4", is_folded=True) == weight).all()


@pytest.mark.parametrize("release", [*FOLDED, *IN_ROWS])
def test_which_order_a_release_has(release, put_release, rng):
    """MXFP4's differs, int4's is one."""
    weight = rng.integers(0, 256, (1, 16, 32), dtype=np.uint8)
    put_release(release)
    for kind in ("fp4", "int4"):
        found = np.zeros_like(weight)
        fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(weight, found, kind)
        is_other = (found != moe_weights.interleave(weight, kind)).any()
        assert is_other == (kind == "fp4" and release in FOLDED)


@pytest.mark.parametrize(("size", "dtype"), [(32, np.dtype(np.uint8)), (128, BF16)])
def test_each_scale_has_its_place(size, dtype, rng):
    together, line = 128 // size, 16 // dtype.itemsize
    slices = line // together
    scales = rng.integers(0, 255, (2, 128, 3 * together)).astype(dtype)
    found = np.zeros((2, 2, 3, 64 // slices, line), dtype)
    fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(scales, found, size)
    for expert, row, group in np.ndindex(scales.shape):
        of_slice, at = divmod(row % 64, 64 // slices)
        block = found[expert, row // 64, group // together]
        assert block[at, of_slice * together + group % together] == scales[expert, row, group]
    assert (moe_weights.unfold_scales(found) == scales).all()


@pytest.mark.parametrize(
    ("shape", "target", "size", "argument"),
    [
        ((2, 96, 8), (2, 1, 2, 16, 16), 32, "scales"),
        ((2, 64, 6), (2, 1, 1, 16, 16), 32, "scales"),
        ((2, 64, 8), (2, 1, 1, 16, 16), 32, "scales_interleaved"),
        ((2, 64, 8), (2, 1, 2, 8, 16), 32, "scales_interleaved"),
        ((2, 64, 8), (2, 1, 2, 16, 16), 64, "group_size"),
        ((2, 64, 8), (2, 1, 8, 8, 8), 128, "scales"),
    ],
)
def test_what_folded_scales_must_be(shape, target, size, argument):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(
            np.zeros(shape, np.uint8), np.zeros(target, np.uint8), size
        )
    assert caught.value.argument == argument


@each_mode
@pytest.mark.parametrize("activation", ["Swiglu", "Gelu"])
def test_results(mode, dtype, activation, folded, rng):
    made = make(rng, mode, dtype, dtype, activation=activation, biases=True)
    assert made.scales[0].ndim == 5
    assert made.worst(made.call()) <= 1


@each_mode
def test_scales_of_the_other_layout(mode, dtype, put_release, rng):
    """Those of a release that folds are refused where rows are in a line, and the other way."""
    for release, other in (("0.6.18", "0.6.13"), ("0.6.13", "0.6.18")):
        put_release(release)
        made = make(rng, mode, dtype, dtype)
        put_release(other)
        error = refused(made, "quant_scales[0] (fc1_weight_scales)")
        assert f"rank {8 - made.scales[0].ndim}" in error.expected


@each_mode
@pytest.mark.parametrize("axis", range(5))
def test_sizes_of_scales(mode, dtype, axis, folded, rng):
    for i in range(2):
        made = make(rng, mode, dtype, dtype)
        made.scales[i] = np.repeat(made.scales[i], 2, axis=axis)
        refused(made, f"quant_scales[{i}] (fc{i + 1}_weight_scales)")


@pytest.mark.parametrize("mode", ["mxfp4", "int4"])
def test_one_step(mode, folded, monkeypatch):
    monkeypatch.setattr(moe_layers, "TOO_SMALL", {})
    for of in ("hidden", "inter"):
        sizes = {"hidden": 384, "inter": 384}
        error = refused(a(mode, **sizes | {of: 128}), "fc2_expert_weights")
        assert f"{of}_size = 128" in error.got
        a(mode, **sizes | {of: 256}).call()


@pytest.mark.parametrize("mode", ["mxfp4", "int4"])
@pytest.mark.parametrize("release", ["0.6.13", "0.6.18", "0.7.2.post1"])
def test_modes_are_there(mode, release):
    for function in (fi_ffi.cutlass_fused_moe, fi_ffi.FusedMoe):
        assert function.supports(90, mode=mode, release=release)
        assert not function.supports(90, mode=mode, release="0.6.9")
