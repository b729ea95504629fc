"""Matrix products, and fp8 with block scales, in float64.

The kernels that are no ops of `fi_ffi.ops.table.gemm` come last (`fi_ffi.ops.matmul`). Products of
segments take addresses, which must be the host's here; one product is selected by its algorithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.tensor import DTYPES, TensorDesc
from fi_ffi.reference.arrays import Array, as_array, store, wide
from fi_ffi.reference.formula import Exact, Formula, Inputs, Judge, OneOfMany, as_inputs

BLOCK = 128
_E4M3 = ml_dtypes.float8_e4m3fn
_E4M3_LIMIT = 448.0
_ALGORITHM_BYTES = 64  # size of a cublasLtMatmulAlgo_t
# Hopper's tensor cores add products of fp8 values, 32 at a time, with about 14 bits. The error of
# an element is less than this part of the sum of its terms' magnitudes.
_FP8_SLACK = 2.0**-10
# The norm of all errors is less than this part of the results' norm after the first 32 terms, and
# grows with the square root of the number of terms.
_FP8_NORM, _FP8_GROUP = 2.0**-10, 32
_ROUNDED = 2.0**-8  # part of the norm, for rounding to bfloat16


def _norm(x: Array) -> float:
    """Return the root of the sum of squares, without overflow of the squares."""
    largest = float(np.abs(x).max(initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if largest else 0.0


def fp8_products(value: Array, magnitude: Array, terms: int, doubt: Array | float = 0.0) -> Judge:
    """Return a judge of fp8 products that a GPU's tensor cores added up.

    `magnitude` is the sum of the terms' magnitudes, `terms` the number of terms added with few
    bits, and `doubt` a further allowed error.
    """
    norm = _ROUNDED + _FP8_NORM * max(terms / _FP8_GROUP, 1.0) ** 0.5

    def judge(got: Array) -> tuple[float, float]:
        if not value.size:
            return 0.0, 0.0
        info = ml_dtypes.finfo(got.dtype)
        error = np.abs(wide(got) - value)
        error = np.where(np.isfinite(error), error, np.inf)
        step = np.maximum(np.abs(value) * float(info.eps), float(info.smallest_subnormal))
        each = (error / (step / 2 * (1 + 2.0**-10) + magnitude * _FP8_SLACK + doubt)).max()
        of_all = _norm(error) if np.isfinite(error).all() else np.inf
        least = np.maximum(doubt, float(info.smallest_subnormal))
        allowed = norm * _norm(value) + _norm(np.broadcast_to(least, value.shape))
        return float(error.max()), float(max(each, of_all / allowed))

    return judge


def bmm_fp8(a: Inputs) -> Exact:
    scale = a["A_scale"].ravel()[0] * a["B_scale"].ravel()[0]
    value = np.einsum("bmk,bkn->bmn", a["A"], a["B"], optimize=True) * scale
    sizes = np.einsum("bmk,bkn->bmn", abs(a["A"]), abs(a["B"]), optimize=True) * abs(scale)
    return {"D": OneOfMany(lambda: value, fp8_products(value, sizes, a["A"].shape[-1]))}


def tinygemm2(a: Inputs) -> Exact:
    bias = a.get("bias", np.zeros(1))
    value = a["input"] @ a["weight"].T + bias
    return {"output": (value, np.abs(a["input"]) @ np.abs(a["weight"].T) + np.abs(bias))}


def router(a: Inputs) -> Exact:
    sizes = np.abs(a["mat_a"]) @ np.abs(a["mat_b"])
    return {"out": (a["mat_a"] @ a["mat_b"], sizes)}


def _over_largest(x: Array, largest: Array) -> tuple[Array, Array]:
    """Divide values by the scale that maps `largest` to fp8's largest number; return them and the
    scale. Larger values are clipped; NaN stays NaN."""
    scale = np.where(largest == 0, 1.0, largest / _E4M3_LIMIT)
    clipped: Array = np.clip(x / scale, -_E4M3_LIMIT, _E4M3_LIMIT)
    return clipped, scale


def _over_rows(x: Array) -> tuple[Array, Array]:
    """Divide rows in pieces of 128 columns: return (rows, columns) and (rows, columns / 128)."""
    pieces = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    values, scales = _over_largest(pieces, np.abs(pieces).max(axis=-1, keepdims=True))
    return values.reshape(x.shape), scales[..., 0]


def fp8_quantize_1x128(a: Inputs) -> Exact:
    before, count = a["outScaleFP8SF"], len(a["input"])
    values, scales = _over_rows(a["input"])
    after = before.copy()
    after[:, :count] = scales.T

    def judge(got: Array) -> tuple[float, float]:
        rest = got[:, count:].astype(np.float64)
        if not np.array_equal(rest, before[:, count:], equal_nan=True):
            return np.inf, np.inf  # the kernel wrote beyond its rows
        error = np.abs(got[:, :count] - scales.T)
        error = np.where(np.isfinite(error), error, np.inf)
        return float(error.max(initial=0)), float((error / scales.T).max(initial=0) / 2.0**-20)

    return {
        "outValueE4M3": (values, np.abs(values)),
        "outScaleFP8SF": OneOfMany(lambda: after, judge),
    }


EXACT: dict[str, Formula] = {
    "bmm_fp8": bmm_fp8,
    "tinygemm2": tinygemm2,
    "tinygemm2_nobias": tinygemm2,
    "mm_M1_16_K7168_N256": router,
    "mm_M1_16_K7168_N128": router,
    "mm_M1_16_K6144_N256": router,
    "fp8_quantize_1x128": fp8_quantize_1x128,
}


def bmm_fp8_get_algos(*arguments: Any) -> int:
    """Return one algorithm: numpy's."""
    algo_buffer = arguments[-1]
    if algo_buffer.size < _ALGORITHM_BYTES:
        return 0
    algo_buffer[:_ALGORITHM_BYTES] = 0
    return 1


def bmm_fp8_run_with_algo(
    A: Array, B: Array, D: Array, A_scale: Array, B_scale: Array, *rest: Any
) -> None:
    algo_buffer, algo_idx = rest[-2:]
    count = algo_buffer.size // _ALGORITHM_BYTES
    if not 0 <= algo_idx < count:
        raise RuntimeError(f"algo_idx {algo_idx} out of range [0, {count})")
    product = bmm_fp8(as_inputs({"A": A, "B": B, "A_scale": A_scale, "B_scale": B_scale}))["D"]
    assert isinstance(product, OneOfMany)
    store(D, product.value())


def _at(address: int, rows: int, columns: int, row_stride: int, dtype: np.dtype[Any]) -> Array:
    """View a matrix in host memory."""
    name = next(known.name for known in DTYPES.values() if known.numpy == dtype)
    return as_array(
        TensorDesc(int(address), (rows, columns), name, strides=(row_stride, 1), device="cpu")
    )


def _products(
    problems: Array,
    matrices: Sequence[Array],
    dtypes: tuple[np.dtype[Any], np.dtype[Any]],
    weight_column_major: bool,
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield left factor, right factor and output of each segment; `matrices` are the addresses of
    x, w and y, then the strides of their rows."""
    kind, of_y = dtypes
    for (m, n, k), x, w, y, x_ld, w_ld, y_ld in zip(problems.tolist(), *matrices, strict=True):
        left, out = _at(x, m, k, x_ld, kind), _at(y, m, n, y_ld, of_y)
        right = _at(w, n, k, w_ld, kind).T if weight_column_major else _at(w, k, n, w_ld, kind)
        yield left, right, out


def cutlass_segment_gemm(workspace_buffer: Array, all_problems: Array, *rest: Any) -> None:
    """Add the products of segments to the output."""
    *matrices, empty_x_data, weight_column_major = rest
    dtypes = (empty_x_data.dtype, empty_x_data.dtype)
    for x, w, y in _products(all_problems, matrices, dtypes, weight_column_major):
        store(y, x.astype(float) @ w.astype(float) + y.astype(float))


def cutlass_segment_gemm_sm90(
    float_workspace_buffer: Array, int_workspace_buffer: Array, all_problems: Array, *rest: Any
) -> None:
    *matrices, empty_x_data, empty_y_data, weight_column_major = rest
    dtypes = (empty_x_data.dtype, empty_y_data.dtype)
    for x, w, y in _products(all_problems, matrices, dtypes, weight_column_major):
        store(y, x.astype(float) @ w.astype(float))


def _rounded(quantised: tuple[Array, Array]) -> tuple[Array, Array]:
    """Round values to fp8 and scales to float32."""
    values, scales = quantised
    return wide(values.astype(_E4M3)), scales.astype(np.float32).astype(np.float64)


def _over_blocks(weight: Array) -> tuple[Array, Array]:
    """Divide a weight by a scale for each block of 128 x 128; return values and scales.

    The kernel looks for the largest value of a block in some rows only: in the j-th of b blocks of
    columns, the first 4 * (b - j) rows. Larger values in other rows are clipped, here as well.
    """
    n, k = weight.shape
    rows, columns = -(-n // BLOCK), k // BLOCK
    values, scales = np.empty(weight.shape), np.empty((rows, columns))
    for i, j in np.ndindex(rows, columns):
        where = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        largest = np.abs(weight[where][: 4 * (columns - j)]).max()
        values[where], scales[i, j] = _over_largest(weight[where], largest)
    return values, scales


def run_gemm(
    input: Array, weight: Array, output: Array, scales_a: Array | None, scales_b: Array | None
) -> None:
    """Multiply; bfloat16 rows and weights are quantised first."""
    a, b = wide(input), wide(weight)
    a, of_a = _rounded(_over_rows(a)) if scales_a is None else (a, scales_a[:, : len(a)].T)
    b, of_b = _rounded(_over_blocks(b)) if scales_b is None else (b, scales_b)
    left, right = _scaled(a, of_a, (1, BLOCK)), _scaled(b, of_b, (BLOCK, BLOCK))
    store(output, left @ right.T)


def _scaled(x: Array, scales: Array, granularity: tuple[int, int]) -> Array:
    """Multiply elements by the scale of their block."""
    repeated = scales.repeat(granularity[0], axis=0).repeat(granularity[1], axis=1)
    scaled: Array = np.asarray(x, np.float64) * repeated[: x.shape[0], : x.shape[1]]
    return scaled


def gemm_fp8_nt_groupwise(
    float_workspace_buffer: Array,
    A: Array,
    B: Array,
    SFA: Array,
    SFB: Array,
    C: Array,
    scale_granularity_m: int,
    scale_granularity_n: int,
    scale_granularity_k: int,
    scale_major_mode: str,
    mma_sm: int = 1,
) -> None:
    of_a, of_b = (SFA, SFB) if scale_major_mode == "K" else (SFA.T, SFB.T)
    a = _scaled(A, of_a, (scale_granularity_m, scale_granularity_k))
    b = _scaled(B, of_b, (scale_granularity_n, scale_granularity_k))
    store(C, a @ b.T)


def group_gemm_fp8_nt_groupwise(
    int_workspace_buffer: Array,
    float_workspace_buffer: Array,
    A: Array,
    B: Array,
    SFA: Array,
    SFB: Array,
    D: Array,
    m_indptr: Array,
    n: int,
    k: int,
    *settings: Any,
) -> None:
    """Compute `gemm_fp8_nt_groupwise` for each group, whose `settings` are the last arguments."""
    step, _, _, scale_major_mode = settings[:4]
    for i, (start, end) in enumerate(itertools.pairwise(m_indptr.tolist())):
        of_rows = np.s_[start // step : -(-end // step)]
        scales = SFA[of_rows] if scale_major_mode == "K" else SFA[:, of_rows]
        factors = A[start:end], B[i], scales, SFB[i]
        gemm_fp8_nt_groupwise(float_workspace_buffer, *factors, D[start:end], *settings)


# Kernels that are no ops of a table, by module and entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "gemm": {
        "bmm_fp8_get_algos": bmm_fp8_get_algos,
        "bmm_fp8_run_with_algo": bmm_fp8_run_with_algo,
        "cutlass_segment_gemm": cutlass_segment_gemm,
    },
    "gemm_sm90": {"cutlass_segment_gemm_sm90": cutlass_segment_gemm_sm90},
    "fp8_blockscale_gemm_90": {"run_gemm": run_gemm},
    "gemm_sm100": {
        "gemm_fp8_nt_groupwise": gemm_fp8_nt_groupwise,
        "group_gemm_fp8_nt_groupwise": group_gemm_fp8_nt_groupwise,
    },
}
