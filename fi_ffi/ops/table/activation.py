"""Gated activations: FlashInfer's `silu_and_mul`, `gelu_and_mul` and `gelu_tanh_and_mul`.

The kernel (`include/flashinfer/activation.cuh`) assumes without a check that both tensors are
contiguous, and runs a thread block for each row. Up to 0.7.0 it loads 16 bytes at a time wherever a
half starts, and a row with fewer elements would be launched with no threads.
"""

from __future__ import annotations

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import PDL, Row, Tensor, Vector

_ARGS = (
    Tensor(
        "out",
        "n d",
        "T",
        "the product; must not share memory with `input`",
        writes=True,
        reads=False,
        contiguous=True,
    ),
    Tensor("input", "n 2*d", "T", "the activated half, then the other factor", contiguous=True),
    PDL,
)


def _rows(name: str, doc: str) -> tuple[Row, ...]:
    # Limits of a grid and of an int.
    always = "d >= 1", f"n <= {INT32_MAX}", f"d <= {2**30 - 1}"
    row = Row(
        name,
        name,  # each is a module of its own
        name,
        "jit/activation.py",
        doc,
        _ARGS,
        dtypes={"T": ("float16", "bfloat16")},
        releases=">=0.6.3",
        vector=Vector(("d",), dtype="T"),
        offset_limit=2**63,
        requires=("d % 8 == 0", *always),
    )
    return forms_of(row, {"0.7.1": {"requires": always}})


ROWS = (
    *_rows(
        "silu_and_mul",
        "Gate with SiLU: `out = silu(input[:, :d]) * input[:, d:]`, silu(x) = x / (1 + exp(-x)).",
    ),
    *_rows(
        "gelu_and_mul",
        "Gate with GELU: `out = gelu(input[:, :d]) * input[:, d:]`, "
        "gelu(x) = x / 2 * (1 + erf(x / sqrt(2))).",
    ),
    *_rows(
        "gelu_tanh_and_mul",
        "Gate with GELU's approximation by tanh: `out = gelu(input[:, :d]) * input[:, d:]`, "
        "gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))).",
    ),
)
