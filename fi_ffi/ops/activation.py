"""Gated activations: FlashInfer's `silu_and_mul`, `gelu_and_mul` and `gelu_tanh_and_mul`."""

from __future__ import annotations

from fi_ffi.ops.row import Row

ROWS: tuple[Row, ...] = ()
