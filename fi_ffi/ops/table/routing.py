"""Routing of tokens to experts: the entry of FlashInfer's `dsv3_fused_routing` module.

The row's requirements beyond the binding's own checks follow the kernel in
`csrc/fused_moe/noAuxTcKernels.cu`. With groups, each of eight warps takes one group, one warp looks
at four chosen groups at most, and a group of one expert has no best two. Without groups, several
warps each pass on eight experts, but may write fewer than eight: 129 experts and top 5 gave wrong
results in 3 of 10 runs on an H200.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, Vector

_FLOATS = ("float32", "bfloat16", "float16")
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_REPLAYED = "0.6.8"

_ROW = Row(
    "fused_topk_deepseek",
    "dsv3_fused_routing",
    "NoAuxTc",
    "csrc/fused_moe/noAuxTcKernels.cu",
    "Choose the experts of each token, and their weights, as DeepSeek-V3 does. Experts rank by "
    "`sigmoid(scores) + bias` (ties by index), groups by the sum of their two best experts. The "
    "best experts of the best groups are chosen, in this order. Their weights are "
    "`sigmoid(scores)`, scaled to sum to `routed_scaling_factor`.",
    (
        Tensor("scores", "n experts", "T", "the router's logits", contiguous=True),
        Tensor(
            "bias", "experts", "B", "correction of the ranks, not of the weights", contiguous=True
        ),
        Scalar("n_group", int, None, "number of groups; 1: no groups", low=1, high=8),
        Scalar("topk_group", int, None, "number of chosen groups", low=1, high=8),
        Scalar("topk", int, None, "number of chosen experts", low=1, high=8),
        Scalar("routed_scaling_factor", float, None, "sum of a token's weights", low=0.0),
        Tensor("topk_values", "n k", "T", "the weights", **_OUT),
        Tensor("topk_indices", "n k", "int32", "the experts", **_OUT),
        Scalar(
            "launch_with_pdl",
            bool,
            False,
            "programmatic dependent launch (SM90 and later): start while the previous kernel "
            "finishes",
        ),
        Tensor(
            "routing_replay_out",
            "most_tokens k",
            "int16",
            "also receives the experts, in its first n rows; the others stay unchanged",
            writes=True,
            contiguous=True,
            optional=True,
            since=_REPLAYED,
            no_index="written",
        ),
    ),
    {"T": _FLOATS, "B": _FLOATS},
    ">=0.6.3",
    vector=Vector(()),
    offset_limit=2**63,
    nothing_axis="n",
    requires=(
        "experts >= 1",
        f"n <= {INT32_MAX}",
        Rule("topk", "topk == k", "as many as the outputs have columns"),
        Rule("n_group", "experts % n_group == 0", "groups of as many experts each"),
        Rule("topk_group", "topk_group <= min(n_group, 4)", "n_group or less, and 4 or less"),
        Rule(
            "topk",
            "topk <= experts // n_group * topk_group",
            "at most as many as the chosen groups have",
        ),
        Rule(
            "topk",
            "n_group > 1 or experts <= 128 or topk == 8",
            "8 for more than 128 experts without groups: for fewer, the kernel reads "
            "uninitialised shared memory",
        ),
        Rule("scores", "n_group > 1 or experts <= 384", "384 experts or less without groups"),
        Rule(
            "scores",
            "n_group == 1 or 2 <= experts // n_group <= 32",
            "2 to 32 experts in each group",
        ),
        Rule(
            "routing_replay_out",
            "not routing_replay_out or most_tokens >= n",
            "a row for each token, or more",
            since=_REPLAYED,
        ),
    ),
)

ROWS = forms_of(_ROW)
