"""`tinygemm_bf16`: a product for few rows, with a bias or without."""

from __future__ import annotations

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.functions import OPS


def tinygemm_bf16(
    input: TensorLike,
    weight: TensorLike,
    out: TensorLike,
    bias: TensorLike | None = None,
    use_pdl: bool = False,
    *,
    stream: object = None,
) -> None:
    """`out = input @ weight.T + bias` for few rows: `tinygemm2`, or `tinygemm2_nobias`.

    Args:
        input: [n, k] bfloat16; weight: [m, k]; out: [n, m], written; bias: [m], or None.
        use_pdl: see `tinygemm2`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/gemm/routergemm.py, csrc/tinygemm2.cu.
    """
    if bias is None:
        OPS["tinygemm2_nobias"](input, weight, out, use_pdl, stream=stream)
    else:
        OPS["tinygemm2"](input, weight, bias, out, use_pdl, stream=stream)
