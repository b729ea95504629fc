"""The families of ops.

Each has its rows in `fi_ffi/ops/table/`, its references and formulas in `fi_ffi/reference/`, and,
where its inputs are not simply random, what makes them in `tests/helpers/inputs/`, under its name.
"""

from __future__ import annotations

FAMILIES = (
    "norm", "norm_fused", "activation", "rope", "rope_quantize", "page", "concat", "gdn", "cascade",
    "gemm", "quantization", "block_scaled", "sampling", "topk", "routing", "mamba", "gemm_sm100",
)  # fmt: skip
