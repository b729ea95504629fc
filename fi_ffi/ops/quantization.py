"""Packing bits and quantising: entries of FlashInfer's `quantization` and others."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
