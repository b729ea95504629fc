"""The op table: the rows of every family."""

from __future__ import annotations

from fi_ffi.ops import (
    activation,
    cascade,
    concat,
    gdn,
    gemm,
    norm,
    norm_fused,
    page,
    quantization,
    rope,
    sampling,
    topk,
)

ROWS = (
    *norm.ROWS,
    *norm_fused.ROWS,
    *activation.ROWS,
    *rope.ROWS,
    *page.ROWS,
    *concat.ROWS,
    *gdn.ROWS,
    *cascade.ROWS,
    *gemm.ROWS,
    *quantization.ROWS,
    *sampling.ROWS,
    *topk.ROWS,
)
