"""Random inputs of `fi_ffi.ops.table.tokenspeed`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fi_ffi.loader import machine
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


EXPERTS = (384, 576, 768, 896)


def make_routing(call: Call) -> None:
    """Logits of any size, and biases that matter beside their scores; a table of experts."""
    sizes, rng, n = call.sizes, call.rng, call.sizes["n"]
    of_softmax = call.row.name == "softmax_topk_flash"
    if of_softmax:
        if call.scalars.setdefault("renormalize", False):
            sizes |= {"experts": 576, "k": min(sizes["k"] // 4 * 4, 128)}
        real = call.scalars.setdefault("num_experts_real", sizes["experts"] * 3 // 4)
        sizes["experts"] = max(sizes["experts"], next((e for e in EXPERTS if e > real), 0))
    experts = sizes["experts"]
    bias = rng.uniform(-3, 3, experts) / (experts if of_softmax else 1)
    table = np.argsort(rng.random((sizes.get("vocab", 0), experts)))[:, :6]
    call.default(
        input=rng.standard_normal((n, experts)) * np.exp(rng.uniform(-1, 1, (n, 1))),
        correction_bias=bias,
        input_ids=rng.integers(0, max(sizes["vocab"], 1), n),
        hash_indices_table=table,
    )


def make_repack(call: Call) -> None:
    sizes, bits = call.sizes, call.scalars.setdefault("num_bits", 4)
    sizes |= {"words": sizes["tiles"] * bits // 2, "columns": sizes["n"] * bits // 2}
    call.default(perm=call.rng.permutation(16 * sizes["tiles"]))


def make_align(call: Call) -> None:
    """Experts of which some have no token, and tokens of which some have no expert."""
    sizes, experts = call.sizes, call.scalars.setdefault("num_experts", 12)
    block = call.scalars.setdefault("block_size", 8)
    routes = sizes["tokens"] * sizes["k"]
    most = routes + min(routes, experts) * (block - 1)
    sizes["most"] = max(sizes.get("most", 0), -(-most // 4) * 4)
    sizes["blocks"] = max(sizes.get("blocks", 0), -(-sizes["most"] // block))
    sizes.setdefault("starts", 8193)
    kinds = call.rng.integers(-1, experts - 1, max(experts // 2, 1))
    call.default(topk_ids=call.rng.choice(kinds, (sizes["tokens"], sizes["k"])))


def make_experts(call: Call) -> None:
    """Routes in blocks, of which some are of no expert where that may be."""
    sizes, rng, experts = call.sizes, call.rng, call.sizes["experts"]
    size, routes = call.scalars.setdefault("moe_block_size", 16), sizes["m"] * sizes["top_k"]
    sizes["routes"] = sizes.get("routes", routes)
    ids = rng.integers(-1 if "_ep" in call.row.name else 0, max(experts, 1), routes)
    blocks: list[int] = []
    places: list[int] = []
    for expert in np.unique(ids).tolist():
        mine = rng.permutation(np.flatnonzero(ids == expert)).tolist()
        mine += [routes] * (-len(mine) % size)
        blocks += [expert] * (len(mine) // size)
        places += mine
    sizes["most"] = max(sizes.get("most", 0), len(places) + 3)
    sizes["blocks"] = max(sizes.get("blocks", 0), -(-sizes["most"] // size))
    count = machine.multiprocessors(0) if machine.device_count() else 1
    sizes["locks"] = max(sizes.get("locks", 0), 4 * count)
    sizes["sums"] = max(sizes.get("sums", 0), 65536 * count)
    k, n, groups = sizes["k"], sizes["n"], sizes.get("groups", 0)
    powers = 2.0 ** rng.integers(-9, -2, (experts, k // 32, n))
    call.default(
        b_q_weight=rng.integers(-(2**31), 2**31, (experts, k // 16, 2 * n)),
        b_scales=rng.uniform(0.01, 0.1, (experts, groups, n)) if groups else powers,
        sorted_token_ids=np.array(places + [routes] * (sizes["most"] - len(places))),
        expert_ids=np.array(blocks + [-7] * (sizes["blocks"] - len(blocks))),
        num_tokens_post_padded=np.array([len(places)]),
        topk_weights=rng.uniform(0.05, 1, (sizes["m"], sizes["top_k"])),
    )


_EXPERTS = Inputs(
    small={"m": 4, "top_k": 2, "k": 64, "n": 128, "experts": 3},
    usual={"m": 70, "top_k": 3, "k": 1024, "n": 512, "experts": 8},
    make=make_experts,
    variants={
        "weighed": {"mul_topk_weights": True},
        "own scratch": {"without": ("workspace", "c_tmp"), "mul_topk_weights": True},
        **{f"blocks of {size}": {"moe_block_size": size} for size in (8, 32, 48, 64)},
    },
)
_OF_INTS = replace(
    _EXPERTS,
    small=_EXPERTS.small | {"k": 128, "groups": 2},
    usual=_EXPERTS.usual | {"groups": 8},
)
# By module, or by op.
INPUTS = {
    "moe_wna16_marlin_gemm_bf16_uint4b8": _OF_INTS,
    "moe_wna16_marlin_gemm_bf16_ep_uint4b8": _OF_INTS,
    "moe_wna16_marlin_gemm_bf16": _EXPERTS,
    "moe_wna16_marlin_gemm_bf16_ep": _EXPERTS,
    "gptq_marlin_repack": Inputs(
        small={"tiles": 2, "n": 64}, usual={"tiles": 32, "n": 1024}, make=make_repack,
        variants={"8 bits": {"num_bits": 8}, "as they are": {"without": ("perm",)}},
    ),
    "moe_align_block_size": Inputs(
        small={"tokens": 9, "k": 3}, usual={"tokens": 700, "k": 6}, make=make_align,
        variants={"own scratch": {"without": ("cumsum_buffer",)},
                  "many experts": {"num_experts": 257, "block_size": 16},
                  "2000 experts": {"num_experts": 2000, "block_size": 64},
                  "5000 experts": {"num_experts": 5000, "block_size": 32}},
    ),
    "tokenspeed-kernel/routing": Inputs(
        small={"n": 5, "experts": 256, "vocab": 9},
        usual={"n": 300, "experts": 384, "vocab": 1000},
        make=make_routing,
    ),
    "softmax_topk_flash": Inputs(
        small={"n": 5, "experts": 384, "k": 7, "vocab": 1},
        usual={"n": 2100, "experts": 768, "k": 12, "vocab": 1},
        make=make_routing,
        variants={"896 experts": {"num_experts_real": 800}, "scaled": {"renormalize": True}},
    ),
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
