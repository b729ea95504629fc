"""How random calls are made, family by family."""

from __future__ import annotations

from fi_ffi.cli.inputs import (
    activation,
    cascade,
    concat,
    gdn,
    gemm,
    norm_fused,
    page,
    quantization,
    rope,
    sampling,
    topk,
)
from fi_ffi.cli.inputs.family import Inputs
from fi_ffi.ops.row import Row

_NORM = Inputs(small={"n": 4, "k": 2, "h": 16}, usual={"n": 32, "k": 8, "h": 4096})
INPUTS: dict[str, Inputs] = {
    "norm": _NORM,
    "page": page.INPUTS,
    "gdn_prefill_sm90": gdn.INPUTS,
}
# By op, where a module's ops differ; by module otherwise.
for _family in (
    activation, cascade, concat, gemm, norm_fused, quantization, rope, sampling, topk
):  # fmt: skip
    INPUTS.update(_family.INPUTS)


def inputs_of(row: Row) -> Inputs:
    return INPUTS.get(row.name) or INPUTS[row.module]
