"""Several products at once, for GPUs that are not here: as one at a time, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def scales(rng, rows: int, k: int) -> np.ndarray:
    """Bytes in whole tiles of 128 rows and 4 columns."""
    tiles = -(-rows // 128) * -(-(k // 32) // 4)
    return rng.integers(120, 130, 512 * tiles, np.uint8)


@pytest.mark.parametrize("out_dtype", [BF16, np.float16, np.float32])
def test_bmm_bf16_is_bf16_gemm_of_each(out_dtype, rng):
    b, m, n, k = 3, 5, 16, 24
    mat1, mat2 = (rng.standard_normal((b, rows, k)).astype(BF16) for rows in (m, n))
    out, one = np.full((b, m, n), np.nan, out_dtype), np.full((m, n), np.nan, out_dtype)
    fi_ffi.bmm_bf16(mat1, mat2, out)
    for i in range(b):
        fi_ffi.bf16_gemm(mat1[i], mat2[i], one)
        assert (out[i] == one).all()


@pytest.mark.parametrize(
    ("b", "m", "n", "k"), [(1, 3, 32, 96), (3, 128, 256, 64), (2, 256, 128, 160)]
)
def test_bmm_mxfp8_is_mxfp8_gemm_of_each(b, m, n, k, rng):
    """Each has the scales of its own tiles: as many bytes as those of one matrix."""
    mat1, mat2 = (rng.standard_normal((b, rows, k)).astype(E4M3) for rows in (m, n))
    of1, of2 = (scales(rng, b * rows, k) for rows in (m, n))
    out, one = np.full((b, m, n), np.nan, BF16), np.full((m, n), np.nan, BF16)
    fi_ffi.bmm_mxfp8(mat1, mat2, of1, of2, out)
    for i in range(b):
        fi_ffi.mxfp8_gemm(mat1[i], mat2[i], np.split(of1, b)[i], np.split(of2, b)[i], one)
        assert (out[i] == one).all()


@pytest.mark.parametrize(("b", "m", "n", "argument", "told"), [
    (2, 64, 128, "mat1", "128 rows in each"), (2, 128, 160, "mat2", "128 rows in each"),
    (2, 192, 128, "mat1", "128 rows in each"), (2, 128, 128, "mat1Scale", "for b * m rows"),
])  # fmt: skip
def test_what_bmm_mxfp8_refuses(b, m, n, argument, told, rng):
    mat1, mat2 = (np.ones((b, rows, 64), E4M3) for rows in (m, n))
    of1, of2 = (scales(rng, b * rows, 64) for rows in (m, n))
    if argument == "mat1Scale":
        of1 = of1[:512]
    out = np.zeros((b, m, n), BF16)
    with pytest.raises(fi_ffi.ArgumentError, match=told.replace("*", r"\*")) as caught:
        fi_ffi.bmm_mxfp8(mat1, mat2, of1, of2, out)
    assert (caught.value.op, caught.value.argument) == ("bmm_mxfp8", argument)
    assert (out == 0).all()
