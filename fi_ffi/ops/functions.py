"""Every op as a module-level function; functions.pyi, generated from the rows, types them."""

from __future__ import annotations

from fi_ffi.ops.op import Op
from fi_ffi.ops.table import ROWS

OPS: dict[str, Op] = {row.name: Op(row) for row in ROWS}
globals().update(OPS)
__all__ = ["OPS", *OPS]
