"""Matrix products: entries of FlashInfer's `gemm` and `gemm_sm90`, and of others like them."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
