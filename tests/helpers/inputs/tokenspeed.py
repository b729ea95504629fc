"""Random inputs of `fi_ffi.ops.table.tokenspeed`."""

from __future__ import annotations

from fi_ffi.ops.table.tokenspeed import ALL_TOKENS, MOST_TOKENS, topk_topp_bytes

from tests.helpers.inputs.family import Call, Inputs
from tests.helpers.inputs.sampling import probabilities


def make_topk_topp(call: Call) -> None:
    """Rows of every way: a few of the best tokens, some of the most, and all."""
    sizes, rng, n = call.sizes, call.rng, call.sizes["n"]
    sizes["workspace_size"] = max(sizes.get("workspace_size", 0), topk_topp_bytes(sizes))
    top_ks = rng.integers(1, MOST_TOKENS + 1, n)
    top_ks[rng.uniform(size=n) < 0.3] = ALL_TOKENS
    call.default(
        probs=probabilities(rng, n, sizes["h"]), top_ks=top_ks, top_ps=rng.uniform(0.05, 1, n)
    )


# By module, or by op.
INPUTS = {
    "fused_topk_topp_renorm": Inputs(
        small={"n": 4, "h": 144}, usual={"n": 32, "h": 4096}, make=make_topk_topp,
        variants={"own scratch": {"without": ("workspace",)}},
    ),
}  # fmt: skip
