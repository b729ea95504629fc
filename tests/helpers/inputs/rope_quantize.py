"""Random inputs of `fi_ffi.ops.table.rope_quantize`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.ops.row import Row
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs import page, rope
from tests.helpers.inputs.family import Inputs, Made


def make(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """Where tokens go to, as in `page.make`, and their positions."""
    if any(arg.name == "positions" for arg in row.args):
        tables, sizes, scalars = page.make(row, tables, sizes, scalars, without, rng)
    return rope.make(row, tables, sizes, scalars, without, rng)


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
