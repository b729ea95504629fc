"""Sampling tokens: entries of FlashInfer's `sampling` module."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
