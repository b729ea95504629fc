"""The op table: the rows of every family."""

from __future__ import annotations

import importlib

from fi_ffi.families import FAMILIES
from fi_ffi.ops.call.row import Row

ROWS: tuple[Row, ...] = tuple(
    row for family in FAMILIES for row in importlib.import_module(f"fi_ffi.ops.table.{family}").ROWS
)
