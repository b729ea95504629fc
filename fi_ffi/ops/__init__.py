"""The op table, and the functions made from it."""

from __future__ import annotations

from fi_ffi.ops import norm
from fi_ffi.ops.op import Op

ROWS = norm.ROWS
OPS: dict[str, Op] = {row.name: Op(row) for row in ROWS}


def forget_entries() -> None:
    """Have every op look its entry up again, after the source of kernels changed."""
    for op in OPS.values():
        op.forget()
