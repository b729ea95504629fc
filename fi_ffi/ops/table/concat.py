"""Concatenating MLA's keys: the entry of FlashInfer's `concat_mla`.

The kernel (`include/flashinfer/concat_mla.cuh`) was written for 128 heads of 128 + 64 elements. It
counts threads in 32 bits, 256 for a token, and also the offset of a head within a token: up to 112
heads from the first.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Row, Tensor, Vector

# 112 head strides stay below 2^31; rounded to whole vectors.
_STRIDES: dict[str, Any] = {"stride_limit": 2**31 // 112 // 16 * 16}
_F16 = ("float16", "bfloat16")

_ROW = Row(
    "concat_mla_k",
    "concat_mla",
    "concat_mla_k",
    "csrc/concat_mla.cu",
    "Concatenate MLA's keys: each head's own part, then the part that all heads share.",
    (
        Tensor(
            "k",
            "n num_heads nope_dim+rope_dim",
            "T",
            "the keys",
            writes=True,
            reads=False,
            **_STRIDES,
        ),
        Tensor("k_nope", "n num_heads nope_dim", "T", "each head's own part", **_STRIDES),
        Tensor("k_rope", "n 1 rope_dim", "T", "the part with the position, shared by all heads"),
    ),
    dtypes={"T": _F16},
    releases=">=0.6.3",
    # 4 elements of a head's own part and 2 of the shared part, in each dtype. For float8 the
    # kernel would accept less.
    vector=Vector(("nope_dim", "rope_dim"), bytes=8),
    offset_limit=2**63,
    requires=("num_heads in (128,)", "nope_dim in (128,)", "rope_dim in (64,)", f"n <= {2**24}"),
)

ROWS = forms_of(_ROW, {"0.6.11": {"dtypes": {"T": (*_F16, "float8_e4m3fn", "float8_e5m2")}}})
