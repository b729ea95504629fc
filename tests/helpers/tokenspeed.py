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
