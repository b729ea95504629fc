"""Random inputs of `fi_ffi.ops.rope`."""

from __future__ import annotations

from fi_ffi.cli.inputs.family import Inputs

# By module, or by op.
INPUTS: dict[str, Inputs] = {}
