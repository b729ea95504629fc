"""Every op as a module-level function. functions.pyi, generated from the rows, has the types."""

from __future__ import annotations

import itertools

from fi_ffi.ops.call.op import Op
from fi_ffi.ops.table import ROWS

# The rows of an op are adjacent, the default release's first.
OPS: dict[str, Op] = {
    name: Op(*rows) for name, rows in itertools.groupby(ROWS, lambda row: row.name)
}
globals().update(OPS)
__all__ = ["OPS", *OPS]
