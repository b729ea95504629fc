"""The greatest of each row: entries of FlashInfer's `topk` module."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
