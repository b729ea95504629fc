"""Random tokens for a router."""

from __future__ import annotations

from tests.helpers.inputs.family import Call, Inputs

# By experts: groups, chosen groups, and chosen experts.
_USUAL = {256: (8, 4, 8), 384: (1, 1, 8), 32: (4, 2, 3)}


def make(call: Call) -> None:
    sizes, rng = call.sizes, call.rng
    groups, kept, count = _USUAL.get(sizes["experts"], (1, 1, min(sizes["experts"], 8)))
    call.scalars.setdefault("n_group", groups)
    call.scalars.setdefault("topk_group", kept)
    call.scalars.setdefault("routed_scaling_factor", 2.5)
    sizes["k"] = call.scalars.setdefault("topk", sizes.get("k", count))
    sizes.setdefault("most_tokens", sizes["n"] + 3)
    call.default(
        scores=rng.standard_normal((sizes["n"], sizes["experts"])),
        bias=rng.uniform(-2, 2, sizes["experts"]),
        routing_replay_out=rng.integers(-9, 0, (sizes["most_tokens"], sizes["k"])),
    )


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "dsv3_fused_routing": Inputs(
        small={"n": 5, "experts": 32},
        usual={"n": 130, "experts": 256},
        make=make,
        variants={
            "no groups": {"n_group": 1, "topk_group": 1},
            "no replay": {"without": ("routing_replay_out",)},
        },
    )
}
