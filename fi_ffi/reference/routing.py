"""`fused_topk_deepseek`, from its definition.

A GPU's sigmoid has an error in the last bits of half precision. If experts or groups are closer
than that, either may be chosen; such tokens are judged by fewer properties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs, OneOfMany

# The relative error of tanh.approx; a sigmoid has half of it.
_TANH = 2.0**-11
_RIGHT, _WRONG = (0.0, 0.0), (np.inf, np.inf)


def _best(ranks: Array, count: int) -> tuple[Array, Array]:
    """Return the indices of the largest elements of each row, in order, and their distance from the
    rest."""
    order = np.argsort(-ranks, axis=1, kind="stable")
    ordered = np.take_along_axis(ranks, order, axis=1)
    if count == ranks.shape[1]:
        return order, np.full(len(ranks), np.inf)
    return order[:, :count], ordered[:, count - 1] - ordered[:, count]


@dataclass(frozen=True)
class Routing:
    """The experts of each token, their weights, and whether rounding could have chosen others."""

    ranks: Array
    experts: Array
    weights: Array
    # The largest error of float32 in `weights`, before the last rounding.
    slack: Array
    is_clear: Array

    def allows(self, got: Array) -> bool:
        """Whether these are the experts, the best one first, as far as rounding allows a
        decision."""
        chosen = got.astype(np.int64)
        if ((chosen < 0) | (chosen >= self.ranks.shape[1])).any():
            return False
        ordered = np.sort(chosen, axis=1)
        if (np.diff(ordered, axis=1) == 0).any():
            return False
        expected = np.sort(self.experts, axis=1)
        ranks = np.take_along_axis(self.ranks, chosen, axis=1)
        falls = np.diff(ranks, axis=1) <= 2 * _TANH
        return bool((ordered == expected)[self.is_clear].all() and falls.all())

    def error_of_weights(self, got: Array, half_step: float) -> tuple[float, float]:
        """Return the error of the weights: of clear tokens in any order, of the others only of
        their sum."""
        # Experts that are close may be in either order: compare weights sorted by size.
        weights = np.sort(got.astype(np.float64), axis=1)
        value = np.sort(self.weights, axis=1)
        slack = self.slack.max(axis=1, keepdims=True)
        bound = half_step * 1.001 * np.abs(value) + slack + np.finfo(np.float64).tiny
        error = np.abs(weights - value)[self.is_clear]
        total = np.abs(weights.sum(axis=1) - value.sum(axis=1))
        of_total = value.shape[1] * bound.max(axis=1)
        if not np.isfinite(weights).all():
            return _WRONG
        worst = max(
            (error / bound[self.is_clear]).max(initial=0), (total / of_total).max(initial=0)
        )
        return float(error.max(initial=0)), float(worst)


def routed(
    scores: Array, bias: Array, groups: int, kept: int, count: int, factor: float
) -> Routing:
    """Route each token; arrays are in float64."""
    share = 1 / (1 + np.exp(-scores))
    ranks = share + bias
    by_group = ranks.reshape(len(ranks), groups, ranks.shape[1] // groups)
    left, group_gap = ranks, np.full(len(ranks), np.inf)
    if groups > 1:
        two = -np.sort(-by_group, axis=2)[:, :, :2].sum(axis=2)
        chosen, group_gap = _best(two, kept)
        stay = np.zeros(two.shape, bool)
        np.put_along_axis(stay, chosen, True, axis=1)
        left = np.where(np.repeat(stay, by_group.shape[2], axis=1), ranks, -np.inf)
    experts, gap = _best(left, count)
    own = np.take_along_axis(share, experts, axis=1)
    total = own.sum(axis=1, keepdims=True) + 1e-20
    weights = factor * own / total
    slack = abs(factor) * _TANH / total * (1 + count * own / total)
    is_clear = np.minimum(gap, group_gap / 2) > 4 * _TANH
    return Routing(ranks, experts, weights, slack, is_clear)


def fused_topk_deepseek(a: Inputs) -> Exact:
    count = a["topk_indices"].shape[1]
    found = routed(
        a["scores"], a["bias"], a["n_group"], a["topk_group"], count, a["routed_scaling_factor"]
    )
    largest = a["largest"]["topk_values"]
    half_step = next(h for most, h in _HALF_STEPS if largest >= most)
    results = {
        "topk_values": OneOfMany(
            lambda: found.weights, lambda got: found.error_of_weights(got, half_step)
        ),
        "topk_indices": OneOfMany(
            lambda: found.experts, lambda got: _RIGHT if found.allows(got) else _WRONG
        ),
    }
    if "routing_replay_out" in a:
        before, rows = a["routing_replay_out"], len(found.experts)

        def replayed(got: Array) -> tuple[float, float]:
            is_kept = (got[rows:] == before[rows:]).all()
            return _RIGHT if is_kept and found.allows(got[:rows]) else _WRONG

        results["routing_replay_out"] = OneOfMany(
            lambda: np.concatenate([found.experts, before[rows:]]), replayed
        )
    return results


# Half a unit in the last place, relative to the value, by the largest value of a dtype.
_HALF_STEPS = ((3.4e38, 2.0**-24), (3.3e38, 2.0**-8), (0.0, 2.0**-11))

EXACT: dict[str, Formula] = {"fused_topk_deepseek": fused_topk_deepseek}
