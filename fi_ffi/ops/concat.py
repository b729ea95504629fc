"""Putting MLA keys together: the entry of FlashInfer's `concat_mla`."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
