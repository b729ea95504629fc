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


def make_transfer(call: Call) -> None:
    """Tokens of any order, and places of which each is there once."""
    sizes, rng = call.sizes, call.rng
    if "layer_id" in {arg.name for arg in call.row.given}:
        call.scalars.setdefault("layer_id", int(rng.integers(sizes["layers"])))
    by_head = call.row.name.endswith("_ph_lf")
    room = sizes["pages"] * sizes["page_size"] if by_head else sizes["src_tokens"]
    call.default(
        src_indices=rng.integers(0, max(room, 1), sizes["n"]),
        dst_indices=rng.permutation(max(sizes["dst_tokens"], sizes["n"]))[: sizes["n"]],
    )


# By module, or by op.
INPUTS = {
    "tokenspeed-kernel/kvcacheio": Inputs(
        small={"n": 5, "src_tokens": 12, "dst_tokens": 9, "item": 24, "layers": 3,
               "pages": 3, "page_size": 4, "head_num": 2, "part": 8},
        usual={"n": 70, "src_tokens": 100, "dst_tokens": 128, "item": 2048, "layers": 3,
               "pages": 9, "page_size": 16, "head_num": 8, "part": 256},
        make=make_transfer,
    ),
    "fused_topk_topp_renorm": Inputs(
        small={"n": 4, "h": 144}, usual={"n": 32, "h": 4096}, make=make_topk_topp,
        variants={"own scratch": {"without": ("workspace",)}},
    ),
}  # fmt: skip
