"""How random calls are made, family by family."""

from __future__ import annotations

import importlib
import importlib.util

from fi_ffi.families import FAMILIES
from fi_ffi.ops.call.row import Row

from tests.helpers.inputs.family import Inputs

# Of families that say nothing of their own.
_PLAIN = Inputs(small={"n": 4, "k": 2, "h": 16}, usual={"n": 32, "k": 8, "h": 4096})
# By op, where a module's ops differ; by module otherwise.
INPUTS: dict[str, Inputs] = {}
for _family in FAMILIES:
    _name = f"tests.helpers.inputs.{_family}"
    if importlib.util.find_spec(_name):
        INPUTS.update(importlib.import_module(_name).INPUTS)


def inputs_of(row: Row) -> Inputs:
    return INPUTS.get(row.name) or INPUTS.get(row.module) or _PLAIN
