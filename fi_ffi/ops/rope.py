"""Rotary position embeddings: entries of FlashInfer's `rope` module."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
