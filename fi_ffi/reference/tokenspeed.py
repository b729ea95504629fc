"""Ops of tokenspeed-kernel, from their definition."""

from __future__ import annotations

import numpy as np

from fi_ffi.ops.table.tokenspeed import ALL_TOKENS
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs, Move, OneOfMany
from fi_ffi.reference.renorm import top_p_error, top_p_renormed, top_p_slack

# The error of sums of the most tokens that are sorted.
_OF_SUMS = 2.0**-16


def _ranked(p: Array) -> Array:
    """Return the tokens, the most probable first, and of those alike the first."""
    return np.argsort(-p, kind="stable")


def _kept(p: Array, k: int, top_p: float) -> Array:
    """Return the row with what is kept of its best `k`, scaled."""
    order = _ranked(p)[:k]
    sums = np.cumsum(p[order])
    count = min(k, int(np.searchsorted(sums, top_p * sums[-1])) + 1)
    value = np.zeros_like(p)
    value[order[:count]] = p[order[:count]] / sums[count - 1]
    return value


def _error(p: Array, got: Array, k: int, top_p: float) -> tuple[float, float]:
    """Return the error of a row: the first of its best `k` are kept, as many as have enough of
    their sum, as far as float32 can tell."""
    order = _ranked(p)
    count = int(np.count_nonzero(got))
    sums = np.concatenate([[0.0], np.cumsum(p[order[:k]])])
    target, slack = top_p * sums[-1], _OF_SUMS * sums[-1]
    if not 0 < count <= k or sums[count - 1] >= target + slack:
        return np.inf, np.inf
    if sums[count] < target - slack and count < k:
        return np.inf, np.inf
    value = np.zeros_like(p)
    value[order[:count]] = p[order[:count]] / sums[count]
    error, allowed = np.abs(got - value), value * (2.0**-23 + SLACK)
    part = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    return float(error.max(initial=0)), float(part.max(initial=0))


def fused_topk_topp_renorm(a: Inputs) -> Exact:
    rows = [*zip(a["probs"], a["top_ks"].astype(int), a["top_ps"], strict=True)]

    def value() -> Array:
        made = [
            top_p_renormed(p, top_p, True) if k == ALL_TOKENS else _kept(p, k, top_p)
            for p, k, top_p in rows
        ]
        return np.reshape(made, a["probs"].shape)

    def judge(got: Array) -> tuple[float, float]:
        errors = [
            top_p_error(p, one, top_p, top_p_slack(len(p), True), True)
            if k == ALL_TOKENS
            else _error(p, one, k, top_p)
            for (p, k, top_p), one in zip(rows, got.astype(np.float64), strict=True)
        ]
        return max(errors, key=lambda error: error[1], default=(0.0, 0.0))

    return {"out": OneOfMany(value, judge)}


def _chosen(source: Array, tokens: Array, layer: int, page_size: int) -> Array:
    """Return one layer of tokens of a cache."""
    if page_size:
        pages, places = np.divmod(tokens, page_size)
        return source[pages, :, places, layer]
    return source[tokens] if source.ndim == 2 else source[tokens, layer]


def transfer(a: Inputs) -> dict[str, Array]:
    """Copy the tokens of one layer, keys and values or latents."""
    moved = {}
    for name in (name for name in a if name in ("src", "src_k", "src_v")):
        source, target = a[name], name.replace("src", "dst")
        page_size = source.shape[2] if source.ndim == 5 else 0
        moved[target] = a[target].copy()
        moved[target][a["dst_indices"]] = _chosen(
            source, a["src_indices"], a.get("layer_id", 0), page_size
        )
    return moved


MOVES: dict[str, Move] = dict.fromkeys(
    (
        "transfer_kv_per_layer",
        "transfer_kv_per_layer_mla",
        "transfer_kv_per_layer_pf_lf",
        "transfer_kv_per_layer_mla_pf_lf",
        "transfer_kv_per_layer_ph_lf",
    ),
    transfer,
)
EXACT: dict[str, Formula] = {"fused_topk_topp_renorm": fused_topk_topp_renorm}
