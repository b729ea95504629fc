"""Which experts each token goes to: the entry of FlashInfer's `dsv3_fused_routing` module.

What the row demands beyond the binding's own checks follows the kernel, in
`csrc/fused_moe/noAuxTcKernels.cu`: with groups a warp takes one, of the eight that there are, one
warp looks at four chosen groups at most, and a group of one expert has no two best ones.  Several
warps without groups hand on eight experts each, of which fewer than eight are written: 129
experts and 5 of them came out wrong in 3 of 10 runs on an H200.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import Row, Rule, Scalar, Tensor, Vector

_INT = 2**31 - 1
_FLOATS = ("float32", "bfloat16", "float16")
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_REPLAYED = "0.6.8"

_ROW = Row(
    "fused_topk_deepseek",
    "dsv3_fused_routing",
    "NoAuxTc",
    "csrc/fused_moe/noAuxTcKernels.cu",
    "Choose each token's experts as DeepSeek-V3 does, and their weights. Experts are ranked by "
    "`sigmoid(scores) + bias`, of equal ones the first comes first; groups of them by the sum of "
    "their two best. Of the best groups, the best experts are chosen, the best one first, and "
    "their weights are `sigmoid(scores)` over the sum of the chosen ones', times "
    "`routed_scaling_factor`.",
    (
        Tensor("scores", "n experts", "T", "the router's logits", contiguous=True),
        Tensor("bias", "experts", "B", "what ranks are corrected by, and weights are not",
               contiguous=True),
        Scalar("n_group", int, None, "how many groups the experts are in; 1 for none", low=1,
               high=8),
        Scalar("topk_group", int, None, "how many groups are chosen", low=1, high=8),
        Scalar("topk", int, None, "how many experts are chosen", low=1, high=8),
        Scalar("routed_scaling_factor", float, None, "what a token's weights add up to", low=0.0),
        Tensor("topk_values", "n k", "T", "the weights", **_OUT),
        Tensor("topk_indices", "n k", "int32", "the experts", **_OUT),
        Scalar("launch_with_pdl", bool, False, "programmatic dependent launch (SM90 and later): "
               "start while the previous kernel drains"),
        Tensor("routing_replay_out", "most_tokens k", "int16", "gets the experts as well, in its "
               "first n rows; the others stay as they are", writes=True, contiguous=True,
               optional=True, since=_REPLAYED),
    ),
    {"T": _FLOATS, "B": _FLOATS},
    ">=0.6.3",
    vector=Vector(()),
    offset_limit=2**63,
    nothing_axis="n",
    requires=(
        "experts >= 1",
        f"n <= {_INT}",
        Rule("topk", "topk == k", "as many as the outputs have columns"),
        Rule("n_group", "experts % n_group == 0", "groups of as many experts each"),
        Rule("topk_group", "topk_group <= min(n_group, 4)", "n_group or less, and 4 or less"),
        Rule("topk", "topk <= experts // n_group * topk_group",
             "as many as the chosen groups have, or less"),
        Rule("topk", "n_group > 1 or experts <= 128 or topk == 8",
             "8 where more than 128 experts are in no groups: of fewer, the kernel reads shared "
             "memory that it has not written"),
        Rule("scores", "n_group > 1 or experts <= 384", "384 experts or less without groups"),
        Rule("scores", "n_group == 1 or 2 <= experts // n_group <= 32",
             "2 to 32 experts in each group"),
        Rule("routing_replay_out", "not routing_replay_out or most_tokens >= n",
             "a row for each token, or more", since=_REPLAYED),
    ),
)  # fmt: skip

ROWS = forms_of(_ROW)
