"""The RMSNorm family: entries of FlashInfer's `norm` module.

The rows' requirements beyond the binding's own checks follow the kernels in
`include/flashinfer/norm.cuh`: the width of loads, and of the integers for offsets.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import PDL, Row, Rule, Scalar, Tensor, Vector

_SOURCE = "csrc/flashinfer_norm_binding.cu"
_T = {"T": ("float16", "bfloat16")}
_T_QUANT = _T | {"O": ("float8_e4m3fn", "float8_e5m2")}

_OUT: dict[str, Any] = {"writes": True, "reads": False}
_EPS = Scalar("eps", float, 1e-6, "added to the mean square before the root", low=0.0)
_WEIGHT = Tensor("weight", "h", "T", "scale of each column")
# 0.6.18 no longer clamps float8_e5m2 to the range of float8_e4m3fn.
_DIVIDED = "the output is divided by it, then clamped to "
_SCALES = (
    Scalar("scale", float, None, f"{_DIVIDED}±448", until="0.6.7"),
    Tensor("scale", "1", "float32", f"{_DIVIDED}±448", since="0.6.7", until="0.6.18"),
    Tensor("scale", "1", "float32", f"{_DIVIDED}O's range", since="0.6.18"),
)
_RESIDUAL = Tensor("residual", "n h", "T", "receives `input + residual`, rounded to T", writes=True)


def _row(name: str, doc: str, *args: Tensor | Scalar, symbol: str = "", **more: Any) -> Row:
    fields = {"dtypes": _T, "releases": ">=0.6.3", "requires": ("h >= 1",)} | more
    return Row(name, "norm", symbol or name, _SOURCE, doc, args, **fields)


def _quant_rows(name: str, doc: str, *tensors: Tensor) -> tuple[Row, ...]:
    row = _row(name, doc, *tensors, *_SCALES, _EPS, PDL, dtypes=_T_QUANT)
    return forms_of(row, {"0.6.18": {"variant": "_full_range"}})


# In place is safe: a thread reads its elements of a row, twice, before it writes the same ones.
_IN_PLACE = (("out", "input"),)
_NORM = (
    Tensor("out", "n h", "T", "may be `input` itself", **_OUT),
    Tensor("input", "n h", "T", "rows to normalise"),
    _WEIGHT,
    _EPS,
    PDL,
)
_FUSED_ADD = (
    Tensor("input", "n h", "T", "receives the normalised rows", writes=True),
    _RESIDUAL,
    _WEIGHT,
    _EPS,
    PDL,
)

ROWS = (
    _row(
        "rmsnorm",
        "RMS-normalise rows: `out = input / sqrt(mean(input**2) + eps) * weight`.",
        *_NORM,
        in_place=_IN_PLACE,
    ),
    _row(
        "qk_rmsnorm",
        "RMS-normalise the last axis of a 3-D tensor, one warp for each (token, head).",
        Tensor("out", "n k h", "T", "may be `input` itself", **_OUT),
        Tensor("input", "n k h", "T", "(tokens, heads, head_dim)"),
        _WEIGHT,
        _EPS,
        PDL,
        symbol="rmsnorm",
        in_place=_IN_PLACE,
    ),
    _row(
        "gemma_rmsnorm",
        "RMS-normalise rows as Gemma does: `out = input / rms(input) * (1 + weight)`.",
        *_NORM,
        in_place=_IN_PLACE,
    ),
    _row(
        "fused_add_rmsnorm",
        "In place: `residual += input`, then `input = residual / rms(residual) * weight`.",
        *_FUSED_ADD,
    ),
    _row(
        "gemma_fused_add_rmsnorm",
        "In place: `residual += input`, then `input = residual / rms(residual) * (1 + weight)`.",
        *_FUSED_ADD,
    ),
    *_quant_rows(
        "rmsnorm_quant",
        "RMS-normalise rows and quantise: `out = fp8(input / rms(input) * weight / scale)`.",
        Tensor("out", "n h", "O", "quantised rows", **_OUT),
        Tensor("input", "n h", "T", "rows to normalise"),
        _WEIGHT,
    ),
    *_quant_rows(
        "fused_add_rmsnorm_quant",
        "`residual += input`, then `out = fp8(residual / rms(residual) * weight / scale)`.",
        Tensor("out", "n h", "O", "quantised rows", **_OUT),
        Tensor("input", "n h", "T", "added to the residual"),
        _RESIDUAL,
        _WEIGHT,
    ),
    _row(
        "layernorm",
        "Layer-normalise rows: `out = (input - mean) / sqrt(variance + eps) * gamma + beta`.",
        Tensor("out", "n h", "T", "normalised rows", as_object=True, contiguous=True, **_OUT),
        Tensor("input", "n h", "T", "rows to normalise", as_object=True, contiguous=True),
        Tensor("gamma", "h", "float32", "scale of each column", as_object=True),
        Tensor("beta", "h", "float32", "shift of each column", as_object=True),
        _EPS,
        dtypes={"T": ("bfloat16",)},
        vector=Vector(("h",), bytes=4, dtype="T"),  # pairs of bfloat16, and so pairs of float32
        # The kernel counts pairs in an int, or single elements if their number is odd.
        requires=(
            "h >= 1",
            f"n <= {INT32_MAX}",
            Rule(
                "input",
                f"h % 2 == 0 or n * h <= {2**31}",
                f"of at most {2**31} elements in rows of an odd size",
            ),
        ),
        in_place=_IN_PLACE,
    ),
)
