"""Random inputs of `fi_ffi.ops.table.concat`."""

from __future__ import annotations

from tests.helpers.inputs.family import Inputs

_HEADS = {"num_heads": 128, "nope_dim": 128, "rope_dim": 64}
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "concat_mla": Inputs(small={"n": 2, **_HEADS}, usual={"n": 32, **_HEADS})
}
