"""Merging attention states: entries of FlashInfer's `cascade` module."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
