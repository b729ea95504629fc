"""Products of `fi_ffi.ops.table.gemm_sm100`, from their definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, every_value
from fi_ffi.reference.formula import Exact, Formula, Inputs
from fi_ffi.reference.moe_weights import fp4

_E4M3 = every_value(np.dtype(ml_dtypes.float8_e4m3fn))


def _in_rows(tiled: Array, rows: int, columns: int) -> Array:
    """Return scales in rows, from tiles of 128 rows and 4 columns in which every 32nd row is
    adjacent."""
    tiles = tiled.astype(int)
    # (tiles of rows, tiles of columns, ...)
    split = tiles.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    whole: Array = split.transpose(0, 3, 2, 1, 4).reshape(128 * len(split), 4 * split.shape[1])
    return whole[:rows, :columns]


def _product(left: Array, right: Array, factor: float = 1.0) -> Exact:
    value, size = left @ right.T, np.abs(left) @ np.abs(right).T
    return {"out": (factor * value, abs(factor) * size)}


def fp4_gemm(a: Inputs) -> Exact:
    scaled = []
    for name in ("mat1", "mat2"):
        values = fp4(a[name].astype(int))
        scales = _in_rows(a[f"{name}Scale"], len(values), values.shape[1] // 16)
        scaled.append(values * _E4M3[scales].repeat(16, axis=1))
    return _product(scaled[0], scaled[1], float(np.ravel(a["globalScale"])[0]))


def mxfp8_gemm(a: Inputs) -> Exact:
    scaled = []
    for name in ("mat1", "mat2"):
        scales = _in_rows(a[f"{name}Scale"], len(a[name]), a[name].shape[1] // 32)
        scaled.append(a[name] * (2.0 ** (scales - 127.0)).repeat(32, axis=1))
    return _product(scaled[0], scaled[1])


def bf16_gemm(a: Inputs) -> Exact:
    return _product(a["mat1"], a["mat2"])


def _each(product: Formula, a: Inputs) -> Exact:
    """Compute a product for each of the matrices."""
    products = [
        product(dict(a) | {name: a[name][i] for name in ("mat1", "mat2")})["out"]
        for i in range(len(a["mat1"]))
    ]
    value, size = (np.stack(each) for each in zip(*products, strict=True))
    return {"out": (value, size)}


def bmm_bf16(a: Inputs) -> Exact:
    return _each(bf16_gemm, a)


def bmm_mxfp8(a: Inputs) -> Exact:
    scaled = {}
    for name in ("mat1", "mat2"):
        b, rows, k = a[name].shape
        scales = _in_rows(a[f"{name}Scale"], b * rows, k // 32).reshape(b, rows, k // 32)
        scaled[name] = a[name] * (2.0 ** (scales - 127.0)).repeat(32, axis=2)
    return _each(bf16_gemm, scaled)


def tgv_gemm(a: Inputs) -> Exact:
    value, size = a["mat2"].T @ a["mat1"].T, np.abs(a["mat2"].T) @ np.abs(a["mat1"].T)
    bias = a.get("bias", np.zeros(1))
    return {"out": (value + bias, size + np.abs(bias))}


EXACT: dict[str, Formula] = {
    "fp4_gemm": fp4_gemm,
    "mxfp8_gemm": mxfp8_gemm,
    "bf16_gemm": bf16_gemm,
    "tgv_gemm": tgv_gemm,
    "bmm_bf16": bmm_bf16,
    "bmm_mxfp8": bmm_mxfp8,
}
