"""What tokenspeed-kernel's ops are by definition: beside sampled.py."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from tests.helpers.definitions import defines
from tests.helpers.sampled import DEFINITIONS

__all__ = ["DEFINITIONS"]

BF16 = ml_dtypes.bfloat16


@defines("fused_topk_topp_renorm")
def _(a):
    """The fewest of the k greatest that have `top_p` of their sum, over their own."""
    found = np.zeros(a["probs"].shape)
    for row, k, top_p, kept in zip(a["probs"], a["top_ks"], a["top_ps"], found, strict=True):
        best = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[: int(k)]
        enough, count = float(top_p) * math.fsum(row[best]), 1
        while math.fsum(row[best[:count]]) < enough:
            count += 1
        kept[best[:count]] = row[best[:count]] / math.fsum(row[best[:count]])
    return {"out": found}


def _chosen(a: dict, score, best) -> dict:
    """Experts of each row by `best` of its scores, with these as weights."""
    n, k = a["topk_indices"].shape
    experts, weights = np.zeros((n, k), int), np.zeros((n, k))
    for i, logits in enumerate(a["input"]):
        scores = score(logits)
        experts[i] = best(scores, i)[:k]
        weights[i] = [scores[j] for j in experts[i]]
    return {"topk_indices": experts, "topk_weights": weights}


def _by_rank(a: dict):
    bias = a["correction_bias"]
    return lambda scores, _: sorted(range(len(scores)), key=lambda j: (-scores[j] - bias[j], j))


def _softplus_root(logits) -> list[float]:
    return [math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))) for x in logits]


def _scaled(a: dict, found: dict) -> dict:
    for weights in found["topk_weights"]:
        weights *= a["routed_scaling_factor"] / math.fsum(weights)
    return found


@defines("softmax_topk_flash")
def _(a):
    def shares(logits):
        powers = [math.exp(x - max(logits)) for x in logits]
        return [power / math.fsum(powers) for power in powers]

    found = _chosen(a, shares, _by_rank(a))
    experts, weights = found["topk_indices"], found["topk_weights"]
    experts[experts >= a["num_experts_real"]] = -1
    for row in weights:
        row *= a["scaling_factor"] / (math.fsum(row) if a["renormalize"] else 1)
    return found


@defines("softplus_sqrt_topk_flash")
def _(a):
    return _scaled(a, _chosen(a, _softplus_root, _by_rank(a)))


@defines("hash_softplus_sqrt_topk_flash")
def _(a):
    table, tokens = a["hash_indices_table"], a["input_ids"].astype(int)
    return _scaled(a, _chosen(a, _softplus_root, lambda _, i: table[tokens[i]].astype(int)))


def _in_marlin(k: int, n: int, bits: int) -> tuple[int, int]:
    """The integer of its row of tiles that has a weight, and where in it: see the layout of
    mma.m16n8k16's operands."""
    thread = k % 8 // 2 + n % 8 * 4
    # Of a thread's 8 weights in 16 columns: two rows, 8 rows on, 8 columns on.
    number = k % 2 + k % 16 // 8 * 2 + n % 16 // 8 * 4
    if bits == 4:
        place, at = number % 2 * 4 + number // 2, thread * 4 + n % 64 // 16
    else:
        place, at = number % 2 * 2 + number % 4 // 2, thread * 8 + n % 64 // 16 * 2 + number // 4
    return n // 64 * (16 * 64 * bits // 32) + at, place * bits


@defines("gptq_marlin_repack")
def _(a):
    """Each weight from where it is to its place."""
    bits, weights = a["num_bits"], a["b_q_weight"].view(np.uint32).astype(object)
    each, (tiles, columns) = 32 // bits, a["out"].shape
    words = [[0] * columns for _ in range(tiles)]
    for k in range(16 * tiles):
        row = int(a["perm"][k]) if "perm" in a else k
        for n in range(weights.shape[1]):
            value = weights[row // each][n] >> row % each * bits & 2**bits - 1
            at, place = _in_marlin(k, n, bits)
            words[k // 16][at] |= value << place
    return {"out": np.array(words, np.uint32).view(np.int32)}


_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


@defines("moe_wna16_marlin_gemm_bf16", "moe_wna16_marlin_gemm_bf16_ep")
def _(a):
    # Scales as marlin_permute_scales and mxfp4_marlin_process_scales of its caller place them.
    places = [i * 8 + j // 4 * 4 + [0, 2, 1, 3][j % 4] for j in range(8) for i in range(8)]
    return _products(a, places, lambda code, scale: _E2M1[code] * scale)


@defines("moe_wna16_marlin_gemm_bf16_uint4b8", "moe_wna16_marlin_gemm_bf16_ep_uint4b8")
def _(a):
    """Scales as marlin_permute_scales places them."""
    places = [i * 8 + j for j in range(8) for i in range(8)]
    return _products(a, places, lambda code, scale: float(BF16((code - 8) * scale)))


def _products(a: dict, places: list[int], weight) -> dict:
    """Route by route, weight by weight; `places` are those of 64 columns' scales."""
    found, (routes, columns) = a["c"].copy(), a["c"].shape
    experts, k = len(a["b_scales"]), a["a"].shape[1]
    matrices = np.zeros((experts, k, columns))
    for e, row, n in np.ndindex(matrices.shape):
        at, shift = _in_marlin(row, n, 4)
        code = int(a["b_q_weight"][e, row // 16, at]) >> shift & 15
        group = row * a["b_scales"].shape[1] // k
        matrices[e, row, n] = weight(code, a["b_scales"][e, group, n // 64 * 64 + places[n % 64]])
    size, top_k = a["moe_block_size"], a["topk_weights"].shape[1]
    for place in range(int(a["num_tokens_post_padded"][0])):
        route, expert = int(a["sorted_token_ids"][place]), int(a["expert_ids"][place // size])
        if route >= routes or expert < 0:
            continue
        token, choice = divmod(route, top_k)
        found[route] = [math.fsum(a["a"][token] * column) for column in matrices[expert].T]
        if a["mul_topk_weights"]:
            found[route] *= a["topk_weights"][token, choice]
    return {"c": found}


@defines("moe_align_block_size")
def _(a):
    routes: dict[int, list[int]] = {}
    for route, expert in enumerate(a["topk_ids"].ravel()):
        routes.setdefault(int(expert), []).append(route)
    count, size = a["topk_ids"].size, a["block_size"]
    places: list[int] = []
    experts = [*a["expert_ids"]]
    for expert in sorted(routes):
        for first in range(0, len(routes[expert]), size):
            experts[len(places) // size] = expert
            block = routes[expert][first : first + size]
            places += block + [count] * (size - len(block))
    rest = [count] * (len(a["sorted_token_ids"]) - len(places))
    return {"sorted_token_ids": places + rest, "expert_ids": experts,
            "num_tokens_post_pad": [len(places)]}  # fmt: skip


def _moved(a: dict, place) -> dict:
    """Tokens one after the other; `place` tells where in the source one is."""
    found = {}
    for name in {"src", "src_k", "src_v"} & {*a}:
        target = name.replace("src", "dst")
        found[target] = a[target].copy()
        for token, to in zip(a["src_indices"].tolist(), a["dst_indices"].tolist(), strict=True):
            found[target][to] = a[name][place(token, a)]
    return found


@defines("transfer_kv_per_layer", "transfer_kv_per_layer_mla")
def _(a):
    return _moved(a, lambda token, _: token)


@defines("transfer_kv_per_layer_pf_lf", "transfer_kv_per_layer_mla_pf_lf")
def _(a):
    return _moved(a, lambda token, a: (token, a["layer_id"]))


@defines("transfer_kv_per_layer_ph_lf")
def _(a):
    """Each page is [heads, tokens, layers, bytes]."""

    def place(token: int, a: dict):
        page, within = divmod(token, a["src_k"].shape[2])
        return page, slice(None), within, a["layer_id"]

    return _moved(a, place)
