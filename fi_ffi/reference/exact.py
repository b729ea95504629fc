"""Ops in float64, written from their definition and not from the kernels: those of all families.

Each formula gives, for every tensor that the op writes, the value and the magnitude that its
rounding errors scale with.  A GPU's results are compared with it, in the tests, by `fi-ffi demo`
and by `fi-ffi replay`; rounded once it is what runs on the CPU.  Those that only move what they
are given (`MOVES`) take it as it is, and give the tensors they write as they must be afterwards,
bit for bit.

`largest` in the inputs has the largest value of each tensor's dtype, where it has one.
"""

from __future__ import annotations

import importlib

from fi_ffi.families import FAMILIES
from fi_ffi.reference.formula import Formula, Move

EXACT: dict[str, Formula] = {}
MOVES: dict[str, Move] = {}
for _family in FAMILIES:
    _module = importlib.import_module(f"fi_ffi.reference.{_family}")
    EXACT.update(getattr(_module, "EXACT", {}))
    MOVES.update(getattr(_module, "MOVES", {}))
