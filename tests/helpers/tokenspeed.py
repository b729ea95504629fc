"""What tokenspeed-kernel's ops are by definition: beside sampled.py."""

from __future__ import annotations

import math

import numpy as np

from tests.helpers.definitions import defines
from tests.helpers.sampled import DEFINITIONS

__all__ = ["DEFINITIONS"]


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
