"""fp8 products with scales of blocks, on SM100: entries of FlashInfer's `gemm_sm100`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, printed
from fi_ffi.ops.matmul.entries import GROUP_GROUPWISE, GROUPWISE, as_called

_NAMES = {
    "A": "a", "B": "b", "SFA": "a_scale", "SFB": "b_scale", "C": "out", "D": "out",
    "float_workspace_buffer": "workspace_buffer",
}  # fmt: skip
_GRANULARITIES = ((1, 128, 128), (128, 128, 128))


def _granularity(op: str, value: Sequence[int]) -> tuple[int, int, int]:
    """Rows, columns and depth of the blocks that have a scale each."""
    if isinstance(value, (tuple, list)) and all(isinstance(size, Integral) for size in value):
        for known in _GRANULARITIES:
            if tuple(value) == known:
                return known
    expected = " or ".join(map(str, _GRANULARITIES))
    raise ArgumentError(op, "scale_granularity_mnk", got=value, expected=expected)


def _modes(op: str, scale_major_mode: str, mma_sm: int) -> None:
    if not isinstance(scale_major_mode, str) or scale_major_mode not in ("MN", "K"):
        got = printed(scale_major_mode)
        raise ArgumentError(op, "scale_major_mode", got=got, expected="'MN' or 'K'")
    if not isinstance(mma_sm, Integral) or isinstance(mma_sm, bool) or mma_sm not in (1, 2):
        raise ArgumentError(op, "mma_sm", got=mma_sm, expected="1 or 2")


def _check_scales(
    op: str, argument: str, scales: TensorDesc, before: tuple[int, ...], rows: int, depth: int,
    mode: str,
) -> None:  # fmt: skip
    """One for each block: of `rows` blocks and `depth` of them along k."""
    blocks = (depth, rows) if mode == "MN" else (rows, depth)
    if scales.shape != (*before, *blocks):
        expected = f"shape {(*before, *blocks)}, with scale_major_mode={mode!r}"
        raise ArgumentError(op, argument, got=scales.layout, expected=expected)


def gemm_fp8_nt_groupwise(
    a: TensorLike,
    b: TensorLike,
    a_scale: TensorLike,
    b_scale: TensorLike,
    scale_major_mode: str,
    mma_sm: int = 1,
    scale_granularity_mnk: Sequence[int] = (1, 128, 128),
    out: TensorLike | None = None,
    *,
    workspace_buffer: TensorLike | None = None,
    stream: object = None,
) -> None:
    """`out = (a * a_scale) @ (b * b_scale).T`, with a scale for each block; SM100.

    Args:
        a: [m, k] and b: [n, k], both float8_e4m3fn or both float8_e5m2; k is a multiple of 128,
            n of 8, and m of 4.
        a_scale: float32, one for each block of `a`: [m / gm, k / 128] in mode "K",
            [k / 128, m / gm] in mode "MN"; b_scale: the same of `b`.
        scale_granularity_mnk: (gm, 128, 128), where gm is 1 or 128.
        out: [m, n] float16 or bfloat16, written.
        mma_sm: 1, or 2 for products of two multiprocessors, quicker for many rows.
        workspace_buffer: uint8 scratch, 32 MiB; without it each stream has its own of fi_ffi's.

    Upstream: flashinfer/gemm/gemm_base.py, csrc/gemm_groupwise_sm100.cu.
    """
    op = "gemm_fp8_nt_groupwise"
    _modes(op, scale_major_mode, mma_sm)
    gm, gn, gk = granularity = _granularity(op, scale_granularity_mnk)
    left, right = as_desc(a, op, "a"), as_desc(b, op, "b")
    for name, desc in (("a", left), ("b", right)):
        if len(desc.shape) != 2:
            raise ArgumentError(op, name, got=desc.layout, expected="rank 2")
    (m, k), (n, _) = left.shape, right.shape
    if m % 4:
        raise ArgumentError(op, "a", got=left.layout, expected="m of a multiple of 4")
    of_a, of_b = as_desc(a_scale, op, "a_scale"), as_desc(b_scale, op, "b_scale")
    _check_scales(op, "a_scale", of_a, (), -(-m // gm), -(-k // gk), scale_major_mode)
    _check_scales(op, "b_scale", of_b, (), -(-n // gn), -(-k // gk), scale_major_mode)
    with as_called(op, _NAMES):
        GROUPWISE(
            workspace_buffer, left, right, of_a, of_b, out, *granularity, scale_major_mode,
            mma_sm, stream=stream,
        )  # fmt: skip


def group_gemm_fp8_nt_groupwise(
    a: TensorLike,
    b: TensorLike,
    a_scale: TensorLike,
    b_scale: TensorLike,
    m_indptr: TensorLike,
    scale_granularity_mnk: Sequence[int] = (1, 128, 128),
    scale_major_mode: str = "MN",
    mma_sm: int = 1,
    out: TensorLike | None = None,
    *,
    stream: object = None,
) -> None:
    """`gemm_fp8_nt_groupwise` of rows in groups, each with a matrix of its own; SM100.

    Args:
        a: [m, k]; b: [groups, n, k]; a_scale: as of `gemm_fp8_nt_groupwise`; b_scale: one such
            for each group.
        m_indptr: [groups + 1] int32: where each group's rows start, and the end; multiples of 4.
            It is on the GPU and is not looked at before the launch.
        out: [m, n] float16 or bfloat16, written.
        others: as of `gemm_fp8_nt_groupwise`.

    Upstream: flashinfer/gemm/gemm_base.py, csrc/group_gemm_fp8_groupwise_sm100.cu.
    """
    op = "group_gemm_fp8_nt_groupwise"
    _modes(op, scale_major_mode, mma_sm)
    gm, gn, gk = granularity = _granularity(op, scale_granularity_mnk)
    left, right = as_desc(a, op, "a"), as_desc(b, op, "b")
    for name, desc, rank in (("a", left, 2), ("b", right, 3)):
        if len(desc.shape) != rank:
            raise ArgumentError(op, name, got=desc.layout, expected=f"rank {rank}")
    (m, k), (groups, n, _) = left.shape, right.shape
    of_a, of_b = as_desc(a_scale, op, "a_scale"), as_desc(b_scale, op, "b_scale")
    _check_scales(op, "a_scale", of_a, (), -(-m // gm), -(-k // gk), scale_major_mode)
    _check_scales(op, "b_scale", of_b, (groups,), -(-n // gn), -(-k // gk), scale_major_mode)
    with as_called(op, _NAMES):
        GROUP_GROUPWISE(
            None, None, left, right, of_a, of_b, out, m_indptr, n, k, *granularity,
            scale_major_mode, mma_sm, stream=stream,
        )  # fmt: skip
