"""Every op as a module-level function; functions.pyi, generated from the rows, types them."""

from __future__ import annotations

import itertools

from fi_ffi.ops.call.op import Op
from fi_ffi.ops.table import ROWS

# An op's rows stand next to each other, that of the default release first.
OPS: dict[str, Op] = {
    name: Op(*rows) for name, rows in itertools.groupby(ROWS, lambda row: row.name)
}
globals().update(OPS)
__all__ = ["OPS", *OPS]
