"""The families of ops.

A family has its rows in `fi_ffi/ops/table/` and its references in `fi_ffi/reference/`. If its
inputs are not plain random tensors, `tests/helpers/inputs/` has a module of the same name.
"""

from __future__ import annotations

FAMILIES = (
    "norm",
    "norm_fused",
    "activation",
    "rope",
    "rope_quantize",
    "page",
    "concat",
    "gdn",
    "cascade",
    "gemm",
    "quantization",
    "block_scaled",
    "sampling",
    "topk",
    "routing",
    "mamba",
    "gemm_sm100",
    "tokenspeed",
)
