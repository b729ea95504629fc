"""Functions that are compiled from rows: every name in them is known, where no test goes too."""

from __future__ import annotations

import builtins
import dis
from types import FunctionType

import pytest

from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.functions import OPS

ROWS = [(name, row) for name, op in OPS.items() for row in op.rows]


def unknown(function: FunctionType) -> set[str]:
    """Globals that a function reads, and that are not there."""
    read = {one.argval for one in dis.get_instructions(function) if one.opname == "LOAD_GLOBAL"}
    return {name for name in read - {*vars(builtins)} if name not in function.__globals__}


def test_an_unknown_name_is_found() -> None:
    found: dict[str, FunctionType] = {}
    exec("def call():\n    if 0 > len('a'): check()", found)
    assert unknown(found["call"]) == {"check"}


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{n} {r.releases}" for n, r in ROWS])
def test_every_name_is_known(name, row) -> None:
    compiled = CompiledRow(row)
    for way in ("call", "pack", "check", "bind", "update"):
        assert not unknown(getattr(compiled, way)), way
