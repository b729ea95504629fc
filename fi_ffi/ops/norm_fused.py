"""Norms fused with what follows them: the other entries of FlashInfer's `norm` module."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
