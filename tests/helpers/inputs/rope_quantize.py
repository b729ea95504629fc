"""Random inputs of `fi_ffi.ops.table.rope_quantize`."""

from __future__ import annotations

from tests.helpers.inputs import page, rope
from tests.helpers.inputs.family import Call, Inputs


def make(call: Call) -> None:
    """Where tokens go to, as in `page.make`, and their positions."""
    if any(arg.name == "positions" for arg in call.row.args):
        page.make(call)
    rope.make(call)


_OWN = Inputs(
    small={
        "nnz": 6, "b": 3, "page_size": 4, "num_qo_heads": 4, "num_kv_heads": 2, "rope_dim": 32,
        "no_rope_dim": 64, "max_seq_len": 9,
    },
    usual={
        "nnz": 32, "b": 4, "page_size": 16, "num_qo_heads": 32, "num_kv_heads": 8, "rope_dim": 64,
        "no_rope_dim": 64, "max_seq_len": 4096,
    },
    make=make,
    variants={"interleaved": {"interleave": True}},
)  # fmt: skip
_MLA = Inputs(
    small=_OWN.small,
    usual={**_OWN.usual, "num_qo_heads": 16, "no_rope_dim": 512},
    make=make,
    variants=_OWN.variants,
)
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "rope_quantize": _OWN,
    "rope_quantize_append_paged_kv_cache": _OWN,
    "rope_quantize_append_paged_mla_kv_cache": _MLA,
}
