"""Random inputs of `fi_ffi.ops.table.activation`."""

from __future__ import annotations

from tests.helpers.inputs.family import Inputs

_INPUTS = Inputs(small={"n": 4, "d": 16}, usual={"n": 32, "d": 4096})
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    f"{activation}_and_mul": _INPUTS for activation in ("silu", "gelu", "gelu_tanh")
}
