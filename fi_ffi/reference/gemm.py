"""References of `fi_ffi.ops.table.gemm` and `fi_ffi.ops.matmul`, in numpy: float32 arithmetic,
rounded where the kernels round.

Products of segments are told by addresses, as the kernels are; these must be of the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.tensor import DTYPES, TensorDesc
from fi_ffi.reference.arrays import Array, as_array, store
from fi_ffi.reference.exact_gemm import bmm_fp8
from fi_ffi.reference.formula import OneOfMany, as_inputs

BLOCK = 128
_E4M3_LIMIT = 448.0
_ALGORITHM_BYTES = 64  # of a cublasLtMatmulAlgo_t


def _float32(x: Array) -> Array:
    return x.astype(np.float32)


def bmm_fp8_get_algos(
    A: Array, B: Array, D: Array, A_scale: Array, B_scale: Array, workspace_buffer: Array,
    *rest: Any,
) -> int:  # fmt: skip
    """There is one: numpy's."""
    algo_buffer = rest[-1]
    if algo_buffer.size < _ALGORITHM_BYTES:
        return 0
    algo_buffer[:_ALGORITHM_BYTES] = 0
    return 1


def bmm_fp8_run_with_algo(
    A: Array, B: Array, D: Array, A_scale: Array, B_scale: Array, workspace_buffer: Array,
    *rest: Any,
) -> None:  # fmt: skip
    count, algo_idx = rest[-2].size // _ALGORITHM_BYTES, rest[-1]
    if not 0 <= algo_idx < count:
        raise RuntimeError(f"algo_idx {algo_idx} out of range [0, {count})")
    made = bmm_fp8(as_inputs({"A": A, "B": B, "A_scale": A_scale, "B_scale": B_scale}))["D"]
    assert isinstance(made, OneOfMany)
    store(D, made.value())


def _at(address: int, rows: int, columns: int, row_stride: int, dtype: np.dtype[Any]) -> Array:
    """A matrix in the host's memory."""
    name = next(known.name for known in DTYPES.values() if known.numpy == dtype)
    return as_array(
        TensorDesc(int(address), (rows, columns), name, strides=(row_stride, 1), device="cpu")
    )


_Product = tuple[Array, Array, Array]


def _products(
    all_problems: Array, ptrs: tuple[Array, ...], strides: tuple[Array, ...],
    dtypes: tuple[np.dtype[Any], np.dtype[Any]], weight_column_major: bool,
) -> Iterator[_Product]:  # fmt: skip
    """Left factor, right factor and output of each segment."""
    kind, of_y = dtypes
    table = zip(all_problems.tolist(), *ptrs, *strides, strict=True)
    for (m, n, k), x, w, y, x_ld, w_ld, y_ld in table:
        left, out = _at(x, m, k, x_ld, kind), _at(y, m, n, y_ld, of_y)
        right = _at(w, n, k, w_ld, kind).T if weight_column_major else _at(w, k, n, w_ld, kind)
        yield left, right, out


def cutlass_segment_gemm(
    workspace_buffer: Array, all_problems: Array, x_ptr: Array, w_ptr: Array, y_ptr: Array,
    x_ld: Array, w_ld: Array, y_ld: Array, empty_x_data: Array, weight_column_major: bool,
) -> None:  # fmt: skip
    """It adds to what is in the output."""
    ptrs, strides = (x_ptr, w_ptr, y_ptr), (x_ld, w_ld, y_ld)
    kinds = (empty_x_data.dtype, empty_x_data.dtype)
    for x, w, y in _products(all_problems, ptrs, strides, kinds, weight_column_major):
        store(y, _float32(x) @ _float32(w) + _float32(y))


def cutlass_segment_gemm_sm90(
    float_workspace_buffer: Array, int_workspace_buffer: Array, all_problems: Array,
    x_ptr: Array, w_ptr: Array, y_ptr: Array, x_stride: Array, weight_stride: Array,
    y_stride: Array, empty_x_data: Array, empty_y_data: Array, weight_column_major: bool,
) -> None:  # fmt: skip
    ptrs, strides = (x_ptr, w_ptr, y_ptr), (x_stride, weight_stride, y_stride)
    kinds = (empty_x_data.dtype, empty_y_data.dtype)
    for x, w, y in _products(all_problems, ptrs, strides, kinds, weight_column_major):
        store(y, _float32(x) @ _float32(w))


def _as_e4m3(values: Array) -> Array:
    """Rounded to nearest even; what is too large becomes the largest, and NaN stays NaN."""
    limited: Array = np.clip(values, -_E4M3_LIMIT, _E4M3_LIMIT)
    return limited.astype(ml_dtypes.float8_e4m3fn)


def _factor(largest: Array) -> Array:
    one = np.float32(1)
    factor: Array = np.where(largest != 0, np.float32(_E4M3_LIMIT) / _float32(largest), one)
    return factor


def quantised_rows(x: Array) -> tuple[Array, Array]:
    """Rows in fp8, and the scale of each 128 columns: (rows, columns / 128) float32."""
    pieces = _float32(x).reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    factor = _factor(np.abs(pieces).max(axis=-1))
    return _as_e4m3(pieces * factor[..., None]).reshape(x.shape), np.float32(1) / factor


def quantised_weight(weight: Array) -> tuple[Array, Array]:
    """A weight in fp8, and a scale for each block of 128 x 128.

    As the kernel has it: in the j-th of b blocks of columns it looks for the largest value in
    the first 4 * (b - j) rows of a block alone, and what is larger than that is clipped.
    """
    n, k = weight.shape
    rows, columns = -(-n // BLOCK), k // BLOCK
    values, scales = np.empty(weight.shape, ml_dtypes.float8_e4m3fn), np.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            where = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            block = _float32(weight[where])
            factor = _factor(np.abs(block[: 4 * (columns - j)]).max())
            values[where], scales[i, j] = _as_e4m3(block * factor), np.float32(1) / factor
    return values, scales.astype(np.float32)


def fp8_quantize_1x128(
    input: Array, outValueE4M3: Array, outScaleFP8SF: Array, use_ue8m0: bool
) -> None:
    values, scales = quantised_rows(input)
    outValueE4M3[...] = values
    outScaleFP8SF[:, : len(input)] = scales.T


def run_gemm(
    input: Array, weight: Array, output: Array, scales_a: Array | None, scales_b: Array | None
) -> None:
    """Partial products of 128 columns each, scaled and added."""
    if scales_a is None:
        input, row_scales = quantised_rows(input)
    else:
        row_scales = scales_a[:, : len(input)].T
    if scales_b is None:
        weight, scales_b = quantised_weight(weight)
    total = np.zeros(output.shape, np.float32)
    for j in range(weight.shape[1] // BLOCK):
        columns = np.s_[:, j * BLOCK : (j + 1) * BLOCK]
        of_rows = np.repeat(scales_b[:, j], BLOCK)[: len(weight)]
        product = _float32(input[columns]) @ _float32(weight[columns]).T
        total += product * row_scales[:, j, None] * of_rows
    store(output, total)


def _spread(scales: Array, granularity: tuple[int, int], shape: tuple[int, int]) -> Array:
    """A scale for each element, of one for each block."""
    repeated = scales.repeat(granularity[0], axis=0).repeat(granularity[1], axis=1)
    return repeated[: shape[0], : shape[1]]


def gemm_fp8_nt_groupwise(
    float_workspace_buffer: Array, A: Array, B: Array, SFA: Array, SFB: Array, C: Array,
    scale_granularity_m: int, scale_granularity_n: int, scale_granularity_k: int,
    scale_major_mode: str, mma_sm: int,
) -> None:  # fmt: skip
    of_a, of_b = (SFA, SFB) if scale_major_mode == "K" else (SFA.T, SFB.T)
    a = _float32(A) * _spread(of_a, (scale_granularity_m, scale_granularity_k), A.shape)
    b = _float32(B) * _spread(of_b, (scale_granularity_n, scale_granularity_k), B.shape)
    store(C, a @ b.T)


def group_gemm_fp8_nt_groupwise(
    int_workspace_buffer: Array, float_workspace_buffer: Array, A: Array, B: Array, SFA: Array,
    SFB: Array, D: Array, m_indptr: Array, n: int, k: int, scale_granularity_m: int,
    scale_granularity_n: int, scale_granularity_k: int, scale_major_mode: str, mma_sm: int,
) -> None:  # fmt: skip
    granularity = (scale_granularity_m, scale_granularity_n, scale_granularity_k)
    for i, (start, end) in enumerate(itertools.pairwise(m_indptr.tolist())):
        of_rows = np.s_[start // scale_granularity_m : -(-end // scale_granularity_m)]
        scales = SFA[of_rows] if scale_major_mode == "K" else SFA[:, of_rows]
        gemm_fp8_nt_groupwise(
            float_workspace_buffer, A[start:end], B[i], scales, SFB[i], D[start:end],
            *granularity, scale_major_mode, mma_sm,
        )  # fmt: skip


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "gemm": {
        "bmm_fp8_get_algos": bmm_fp8_get_algos,
        "bmm_fp8_run_with_algo": bmm_fp8_run_with_algo,
        "cutlass_segment_gemm": cutlass_segment_gemm,
    },
    "gemm_sm90": {"cutlass_segment_gemm_sm90": cutlass_segment_gemm_sm90},
    "fp8_blockscale_gemm_90": {"fp8_quantize_1x128": fp8_quantize_1x128, "run_gemm": run_gemm},
    "gemm_sm100": {
        "gemm_fp8_nt_groupwise": gemm_fp8_nt_groupwise,
        "group_gemm_fp8_nt_groupwise": group_gemm_fp8_nt_groupwise,
    },
}
