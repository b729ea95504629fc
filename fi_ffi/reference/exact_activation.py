"""Ops of `fi_ffi.ops.activation` in float64, from their definition: see exact.py."""

from __future__ import annotations

from fi_ffi.reference.formula import Formula, Move

EXACT: dict[str, Formula] = {}
MOVES: dict[str, Move] = {}
