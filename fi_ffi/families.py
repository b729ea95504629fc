"""The families of ops.

Each has its rows in `fi_ffi/ops/`, its references and formulas in `fi_ffi/reference/`, and, where
its inputs are not simply random, what makes them in `fi_ffi/cli/inputs/`, all under its name.
"""

from __future__ import annotations

FAMILIES = (
    "norm", "norm_fused", "activation", "rope", "page", "concat", "gdn", "cascade", "gemm",
    "quantization", "sampling", "topk",
)  # fmt: skip
