"""Kernels that `tokenspeed-kernel` publishes, in libraries of its own.

The rows' requirements follow its sources, `thirdparty/cuda/csrc`, and what an H100 gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.row import Absent, Row, Tensor, Vector

_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
# The libraries have code for sm_90a, sm_100a and sm_103a.
_FIELDS: dict[str, Any] = {
    "releases": ">=0.1.4",
    "capabilities": (9, 10),
    "elsewhere": "its libraries have code for no other",
    "vector": Vector(()),
    "offset_limit": 2**63,
}


def _row(name: str, library: str, source: str, doc: str, *args: Any, **more: Any) -> Row:
    module = f"tokenspeed-kernel/{library}"
    fields = {"dtypes": {}, **_FIELDS, **more}
    return Row(name, module, name, f"csrc/{source}", doc, args, **fields)


# Of `top_ks`: all tokens, so that `top_ps` alone counts; and the most that the kernel sorts.
ALL_TOKENS, MOST_TOKENS = 2**30, 128


def topk_topp_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of `workspace`, as `fused_topk_topp_workspace_size` of the library does."""
    n, h = sizes["n"], sizes["h"]
    candidates, buffered = h // 32 // 64 * 64, round_up(h // 32, 256)
    counts = 8192 * n
    top_k = round_up(640 * n, 256) + counts + 4 * round_up(4 * n * candidates, 256) + 255
    top_p = round_up(384 * n, 256) + 3 * counts + 256 + 2 * round_up(4 * n * buffered, 256)
    return round_up(top_k, 256) + 2 * round_up(4 * n * MOST_TOKENS, 256) + top_p + 255


ROWS = (
    _row(
        "fused_topk_topp_renorm", "fused_topk_topp",
        "fused_topk_topp/fused_topk_topp_binding.cu",
        f"Keep the `top_ks` most probable tokens of each row, and of these the most probable that "
        f"have `top_ps` of their sum; scale them to sum to 1. From {MOST_TOKENS + 1} on, and not "
        f"for 2^30 alone, the kernel takes `top_ks` for all tokens.",
        Tensor(
            "probs", "n h", "float32", "rows that sum to 1", contiguous=True, offset_limit=2**31
        ),
        Tensor(
            "top_ks", "n", "int32", f"1 to {MOST_TOKENS}, or 2^30 for all tokens", contiguous=True,
            index=(f"1 <= top_ks <= {MOST_TOKENS} where top_ks != {ALL_TOKENS}",),
        ),
        Tensor("top_ps", "n", "float32", "more than 0, and 1 or less", contiguous=True),
        Tensor(
            "out", "n h", "float32", "0 for tokens that are not kept", offset_limit=2**31, **_OUT
        ),
        Tensor(
            "workspace", "workspace_size", "uint8", "scratch of "
            "`fused_topk_topp_workspace_size(n, h)` bytes, for one stream at a time; by default "
            "fi_ffi keeps one for each stream",
            writes=True, reads=False, contiguous=True, bytes_for=topk_topp_bytes,
        ),
        Absent("side_stream_handle", "int"),
        Absent("enable_pdl", "bool"),
        # The kernel sorts MOST_TOKENS tokens, whatever `top_ks` is; a grid's second dimension
        # counts rows.
        requires=(f"h >= {MOST_TOKENS + 1}", f"h <= {2**24}", f"n <= {2**16 - 1}"),
    ),
)  # fmt: skip
