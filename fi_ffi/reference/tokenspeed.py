"""Ops of tokenspeed-kernel, from their definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import ml_dtypes
import numpy as np

from fi_ffi.ops.table.tokenspeed import ALL_TOKENS
from fi_ffi.reference.arrays import Array, wide
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


@dataclass(frozen=True)
class _Routing:
    """The experts of each token in order, their weights, and what each may be off by.

    If rounding could have put experts into another order, less is known of a token.
    """

    ranks: Array
    # Of each rank, and what else it is computed of.
    slack: Array
    experts: Array
    weights: Array
    of_weights: Array
    real: int

    @cached_property
    def is_clear(self) -> Array:
        """Whether each token's experts are the ones, and in this order."""
        order, count = np.argsort(-self.ranks, axis=1, kind="stable"), self.experts.shape[1]
        ranks, slack = (np.take_along_axis(x, order, axis=1) for x in (self.ranks, self.slack))
        # The most that any after it could be.
        most = np.maximum.accumulate((ranks + slack)[:, ::-1], axis=1)[:, ::-1]
        least = (ranks - slack)[:, : most.shape[1] - 1]
        return np.asarray((least > most[:, 1:])[:, :count].all(axis=1))

    def shown(self, experts: Array) -> Array:
        """Return experts, and -1 in place of those that do nothing."""
        found: Array = np.where(experts < self.real, experts, -1)
        return found

    def error_of_experts(self, got: Array) -> tuple[float, float]:
        chosen, rows = got.astype(np.int64), np.arange(len(got))[:, None]
        if (chosen >= self.real).any() or (chosen < -1).any():
            return np.inf, np.inf
        if (chosen != self.shown(self.experts))[self.is_clear].any():
            return np.inf, np.inf
        last = np.sort(self.ranks - self.slack, axis=1)[:, -self.experts.shape[1], None]
        could_be = self.ranks + self.slack >= last
        is_real = chosen >= 0
        counts = np.zeros((len(got), self.ranks.shape[1]), np.int64)
        np.add.at(counts, (np.broadcast_to(rows, got.shape)[is_real], chosen[is_real]), 1)
        idle = np.count_nonzero(could_be[:, self.real :], axis=1)
        is_right = (counts <= could_be).all() and ((~is_real).sum(axis=1) <= idle).all()
        return (0.0, 0.0) if is_right else (np.inf, np.inf)

    def error_of_weights(self, got: Array) -> tuple[float, float]:
        """Of the others only that they are numbers."""
        unclear = ~self.is_clear[:, None] & np.isfinite(got)
        return _off(np.where(unclear, got, self.weights), self.of_weights, got)

    @property
    def expected(self) -> Exact:
        return {
            "topk_indices": OneOfMany(lambda: self.shown(self.experts), self.error_of_experts),
            "topk_weights": OneOfMany(lambda: self.weights, self.error_of_weights),
        }


def _off(value: Array, slack: Array, got: Array) -> tuple[float, float]:
    """Return the error of float32 that may be off by so much, and be rounded."""
    error = np.where(np.isfinite(got), np.abs(got - value), np.inf)
    allowed = slack + np.abs(value) * 2.0**-24 + np.finfo(np.float64).tiny
    return float(error.max(initial=0)), float((error / allowed).max(initial=0))


def _weighed(own: Array, slack: Array, factor: float, is_normed: bool) -> tuple[Array, Array]:
    """Return weights and what they may be off by."""
    total = own.sum(axis=1, keepdims=True) if is_normed else np.ones((len(own), 1))
    of_total = slack.sum(axis=1, keepdims=True) if is_normed else 0.0
    share = own / total
    return factor * share, abs(factor) * (slack + share * of_total) / total


def _routed(
    scores: Array, of_scores: float, bias: Array, count: int, factor: float, *, is_normed: bool,
    is_after: bool = False, real: int = 2**31,
) -> Exact:  # fmt: skip
    """Choose by scores, which are right to this part; `is_after`: a weight is what is left of a
    rank without the bias."""
    ranks = scores + bias
    each = of_scores * scores + 2.0**-23 * (np.abs(ranks) + np.abs(bias))
    experts = np.argsort(-ranks, axis=1, kind="stable")[:, :count]
    own, left = (np.take_along_axis(x, experts, axis=1) for x in (scores, each))
    slack = left if is_after else (of_scores + 2.0**-21) * own
    weights = _weighed(own, slack + own * 2.0**-22, factor, is_normed)
    return _Routing(ranks, each, experts, *weights, real).expected


# What quick exponentials of numbers around 20, and their sums, may be off by in float32.
_EXPONENTIALS = 2.0**-17


def softmax_topk_flash(a: Inputs) -> Exact:
    powers = np.exp(a["input"] - a["input"].max(axis=1, keepdims=True, initial=-np.inf))
    return _routed(
        powers / powers.sum(axis=1, keepdims=True), _EXPONENTIALS, a["correction_bias"],
        a["topk_indices"].shape[1], a["scaling_factor"], is_normed=a["renormalize"],
        is_after=True, real=a["num_experts_real"],
    )  # fmt: skip


def softplus_sqrt_topk_flash(a: Inputs) -> Exact:
    scores = np.sqrt(np.logaddexp(0, a["input"]))
    factor, count = a["routed_scaling_factor"], a["topk_indices"].shape[1]
    return _routed(scores, _EXPONENTIALS, a["correction_bias"], count, factor, is_normed=True)


def hash_softplus_sqrt_topk_flash(a: Inputs) -> Exact:
    experts = a["hash_indices_table"].astype(np.int64)[a["input_ids"].astype(np.int64)]
    scores = np.sqrt(np.logaddexp(0, np.take_along_axis(a["input"], experts, axis=1)))
    weights, slack = _weighed(scores, scores * _EXPONENTIALS, a["routed_scaling_factor"], True)
    return {
        "topk_indices": (experts.astype(np.int32), None),
        "topk_weights": OneOfMany(lambda: weights, partial(_off, weights, slack)),
    }


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


# What a tile of 16 x 64 weights has in the eight that a thread takes: two columns of four.
_ROWS, _COLUMNS = np.array([0, 1, 8, 9] * 2), np.repeat([0, 8], 4)
# Which of these each integer has, by the bits of a weight.
_OF_INTEGERS = {
    4: np.array([[0, 2, 4, 6, 1, 3, 5, 7]]),
    8: np.array([[0, 2, 1, 3], [4, 6, 5, 7]]),
}


def _order(bits: int) -> tuple[Array, Array]:
    """Return the row and the column of each weight of a tile, in Marlin's order: by thread, by
    warp, by integer."""
    thread, warp = np.arange(32)[:, None, None, None], np.arange(4)[None, :, None, None]
    of = _OF_INTEGERS[bits][None, None]
    rows = 2 * (thread % 4) + _ROWS[of] + 0 * warp
    columns = 16 * warp + thread // 4 + _COLUMNS[of]
    return rows.reshape(-1, 32 // bits), columns.reshape(-1, 32 // bits)


def _unpacked(words: Array, bits: int) -> Array:
    """Return the numbers of each integer on a new last axis, the lowest first."""
    each: Array = words.astype(np.int64)[..., None] >> np.arange(0, 32, bits) & (2**bits - 1)
    return each


def gptq_marlin_repack(a: Inputs) -> dict[str, Array]:
    bits, packed = a["num_bits"], a["b_q_weight"]
    rows, n = len(packed) * 32 // bits, packed.shape[1]
    weights = np.swapaxes(_unpacked(packed, bits), 1, 2).reshape(rows, n)
    if "perm" in a and a["perm"].size:
        weights = weights[a["perm"]]
    down, right = _order(bits)
    tiles = weights.reshape(rows // 16, 16, n // 64, 64).swapaxes(1, 2)[:, :, down, right]
    words = (tiles << np.arange(0, 32, bits)).sum(axis=-1)
    return {"out": words.astype(np.uint32).view(np.int32).reshape(a["out"].shape)}


def moe_align_block_size(a: Inputs) -> Exact:
    """Which route of an expert comes first is left open."""
    ids, size = a["topk_ids"].astype(np.int64).ravel(), a["block_size"]
    most, none = len(a["sorted_token_ids"]), ids.size
    used, counts = np.unique(ids, return_counts=True)
    blocks = -(-counts // size)
    places = np.full(most, none)
    starts = np.cumsum(blocks * size) - blocks * size
    for expert, start, count in zip(used, starts, counts, strict=True):
        places[start : start + count] = np.flatnonzero(ids == expert)
    experts = a["expert_ids"].astype(np.int32)
    experts[: blocks.sum()] = np.repeat(used, blocks)

    def judge(got: Array) -> tuple[float, float]:
        found = got.astype(np.int64)
        for start, count in zip(starts, counts, strict=True):
            found[start : start + count].sort()
        return (0.0, 0.0) if (found == places).all() else (np.inf, np.inf)

    return {
        "sorted_token_ids": OneOfMany(lambda: places, judge),
        "expert_ids": (experts, None),
        "num_tokens_post_pad": (np.array([blocks.sum() * size], np.int32), None),
    }


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_FP4 = np.concatenate([_E2M1, -_E2M1])


def _unmarlin(words: Array, scales: Array, is_int: bool) -> Array:
    """Return an expert's weights [k, n]."""
    k, n = 16 * len(words), scales.shape[1]
    tiles = np.empty((k // 16, n // 64, 16, 64))
    down, right = _order(4)
    codes = _unpacked(words, 4).reshape(k // 16, n // 64, *down.shape)
    tiles[:, :, down, right] = codes - 8 if is_int else _FP4[codes]
    # Of 64 columns, which has each scale.
    eights = np.arange(0, 64, 8) if is_int else np.array([0, 16, 8, 24, 32, 48, 40, 56])
    columns = np.argsort((eights + np.arange(8)[:, None]).ravel())
    groups = len(scales)
    each = scales.reshape(groups, n // 64, 64)[:, :, columns].reshape(groups, n)
    whole: Array = tiles.swapaxes(1, 2).reshape(k, n) * each.repeat(k // groups, axis=0)
    return wide(whole.astype(ml_dtypes.bfloat16)) if is_int else whole


def moe_wna16_marlin_gemm(a: Inputs, is_int: bool = False) -> Exact:
    """A product is rounded, its weight as well, and what they give."""
    size, top_k, is_weighed = a["moe_block_size"], a["topk_weights"].shape[1], a["mul_topk_weights"]
    value, allowed = a["c"].copy(), np.zeros(a["c"].shape)
    tokens, shares = a["a"], a["topk_weights"].ravel()
    experts = a["expert_ids"].astype(int)[: int(a["num_tokens_post_padded"][0]) // size]
    routes = a["sorted_token_ids"].astype(int)
    for block, expert in enumerate(experts):
        some = routes[block * size : (block + 1) * size]
        some = some[some < len(value)]
        if expert < 0 or not len(some):
            continue
        weights = _unmarlin(a["b_q_weight"][expert], a["b_scales"][expert], is_int)
        share = shares[some, None] if is_weighed else np.ones((len(some), 1))
        own = tokens[some // top_k]
        value[some] = own @ weights * share
        sums = np.abs(own) @ np.abs(weights) * np.abs(share)
        allowed[some] = sums * 2.0**-18 + np.abs(value[some]) * (3 if is_weighed else 1) * 2.0**-8

    return {"c": OneOfMany(lambda: value, partial(_off, value, allowed * 1.01))}


MOVES: dict[str, Move] = {
    "gptq_marlin_repack": gptq_marlin_repack,
    **dict.fromkeys(
        (
            "transfer_kv_per_layer",
            "transfer_kv_per_layer_mla",
            "transfer_kv_per_layer_pf_lf",
            "transfer_kv_per_layer_mla_pf_lf",
            "transfer_kv_per_layer_ph_lf",
        ),
        transfer,
    ),
}
EXACT: dict[str, Formula] = {
    "moe_align_block_size": moe_align_block_size,
    "moe_wna16_marlin_gemm_bf16": moe_wna16_marlin_gemm,
    "moe_wna16_marlin_gemm_bf16_ep": moe_wna16_marlin_gemm,
    **dict.fromkeys(
        ("moe_wna16_marlin_gemm_bf16_uint4b8", "moe_wna16_marlin_gemm_bf16_ep_uint4b8"),
        partial(moe_wna16_marlin_gemm, is_int=True),
    ),
    "fused_topk_topp_renorm": fused_topk_topp_renorm,
    "softmax_topk_flash": softmax_topk_flash,
    "softplus_sqrt_topk_flash": softplus_sqrt_topk_flash,
    "hash_softplus_sqrt_topk_flash": hash_softplus_sqrt_topk_flash,
}
