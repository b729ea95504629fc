"""What tests read from a row's conditions: the numbers that its sizes are compared with."""

from __future__ import annotations

import re

from fi_ffi.ops.call.notation import Condition
from fi_ffi.ops.call.row import Row

_NUMBERS = re.compile(r"\(?\d+(, \d+)*,?\)?")


def limits(row: Row, kind: str) -> dict[str, tuple[int, ...]]:
    """The numbers with which ">=", "<=", "in" or "%" compares sizes, by size."""
    each = map(_limit, row.conditions)
    return {limit[1]: limit[2] for limit in each if limit and limit[0] == kind}


def _limit(condition: Condition) -> tuple[str, str, tuple[int, ...]] | None:
    axis, numbers = condition.left, condition.right
    if condition.guard or not _NUMBERS.fullmatch(numbers) or not axis.isidentifier():
        return None
    return condition.operator, axis, tuple(map(int, re.findall(r"\d+", numbers)))
