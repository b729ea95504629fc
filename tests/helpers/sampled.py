"""Samplers and filters of whole rows from their definitions: beside definitions.py."""

from __future__ import annotations

import math

import numpy as np

from fi_ffi.reference.philox import uniforms

from tests.helpers.definitions import DEFINITIONS, defines, empty

__all__ = ["DEFINITIONS"]


@defines("softmax")
def _(a):
    found = empty(a["output"])
    for i, row in enumerate(a["logits"]):
        given = a.get("maybe_temperature_arr", [a["temperature_val"]] * (i + 1))
        powers = [math.exp(x / float(np.float32(given[i]))) for x in row]
        found[i] = [x / math.fsum(powers) for x in powers]
    return {"output": found}


def _k_of(a: dict, i: int) -> int:
    return int(a["maybe_top_k_arr"][i] if "maybe_top_k_arr" in a else a["top_k_val"])


def _without_rest(a: dict, rows: str, rest: float) -> np.ndarray:
    """Rows with what is less than the k-th greatest replaced."""
    found = empty(a[rows])
    for i, row in enumerate(a[rows]):
        least = sorted(row, reverse=True)[min(_k_of(a, i), len(row)) - 1]
        found[i] = [x if x >= least else rest for x in row]
    return found


@defines("top_k_mask_logits")
def _(a):
    return {"mask_logits": _without_rest(a, "logits", -math.inf)}


@defines("top_k_renorm_probs", "top_k_renorm_probs_deterministic")
def _(a):
    kept = _without_rest(a, "probs", 0.0)
    return {"renorm_probs": np.array([[x / math.fsum(row) for x in row] for row in kept])}


@defines("top_p_renorm_probs")
def _(a):
    """The fewest of the greatest that sum to `top_p`, over their sum."""
    found = np.zeros(a["probs"].shape)
    for i, row in enumerate(a["probs"]):
        top_p = float(np.float32(a.get("maybe_top_p_arr", [a["top_p_val"]] * (i + 1))[i]))
        order, count, total = sorted(row, reverse=True), 0, 0.0
        while count < len(order) and total < top_p:
            total, count = total + order[count], count + 1
        kept = [x if x >= order[count - 1] else 0.0 for x in row]
        found[i] = [x / math.fsum(kept) for x in kept]
    return {"renorm_probs": found}


def _seed(a: dict) -> tuple[int, int]:
    """The seed and the offset, from arrays or from numbers."""
    found = (
        int(a[f"maybe_{name}_arr"][0]) if f"maybe_{name}_arr" in a
        else a.get(f"{name}_val", a.get(f"philox_{name}"))
        for name in ("seed", "offset")
    )  # fmt: skip
    return tuple(found)


def _uniforms(a: dict, i: int):
    """An output's random numbers; what makes them has its own tests."""
    seed, offset = _seed(a)
    yield from map(float, uniforms(seed, np.array([i]), offset, 200)[0])


def _first_past(p, chosen, at: float) -> int:
    """The first of the chosen at which their running sum exceeds `at`, or the last of them."""
    total = 0.0
    for token in chosen:
        total += p[token]
        if total > at:
            return token
    return chosen[-1] if chosen else -1


def _redrawn(p, k: float, top_p: float, numbers) -> int:
    """Draw above a rising pivot until fewer than `k`, and less than `top_p`, are above."""

    def above(pivot: float) -> tuple[bool, float]:
        values = [x for x in p if x > pivot]
        return len(values) < k and math.fsum(values) < top_p, math.fsum(values)

    low, high, mass = 0.0, 1.0, 1.0
    while True:
        token = _first_past(p, [i for i, x in enumerate(p) if x > low], next(numbers) * mass)
        if token < 0 or above(p[token])[0]:
            return token
        middle = float((np.float32(p[token]) + np.float32(high)) * np.float32(0.5))
        if above(middle)[0]:
            low, high = p[token], middle
        else:
            low = middle
        if low >= high:
            return token
        mass = above(low)[1]


def _min_p(p, least: float, numbers) -> int:
    chosen = [i for i, x in enumerate(p) if x >= float(np.float32(max(p)) * np.float32(least))]
    return _first_past(p, chosen, next(numbers) * math.fsum(p[i] for i in chosen))


def _samples(draw, *parameters: str, of_rows: bool):
    def definition(a):
        tokens = []
        for i in range(len(a["output"])):
            row = int(a["maybe_indices"][i]) if "maybe_indices" in a else i
            at = row if of_rows else i
            given = [
                float(a[f"maybe_{name}_arr"][at] if f"maybe_{name}_arr" in a else a[f"{name}_val"])
                for name in parameters
            ]
            tokens.append(draw(a["probs"][row], *given, _uniforms(a, i)))
        found = {"output": np.array(tokens)}
        return found | ({"valid": np.ones(len(tokens), bool)} if "valid" in a else {})

    return definition


def _plain(p, numbers) -> int:
    return _first_past(p, [i for i, x in enumerate(p) if x > 0], next(numbers))


_SAMPLERS = {
    "sampling_from_probs": _samples(_plain, of_rows=True),
    "top_p_sampling_from_probs": _samples(
        lambda p, top_p, numbers: _redrawn(p, math.inf, float(np.float32(top_p)), numbers),
        "top_p", of_rows=True,
    ),
    "top_k_top_p_sampling_from_probs": _samples(
        lambda p, k, top_p, numbers: _redrawn(p, int(k), float(np.float32(top_p)), numbers),
        "top_k", "top_p", of_rows=True,
    ),
}  # fmt: skip
for _of_rows, _more in ((False, ("", "_without_valid", "_of_numbers")), (True, ("_by_row",))):
    for _variant in _more:
        _SAMPLERS[f"top_k_sampling_from_probs{_variant}"] = _samples(
            lambda p, k, numbers: _redrawn(p, int(k), math.inf, numbers), "top_k", of_rows=_of_rows
        )
        _SAMPLERS[f"min_p_sampling_from_probs{_variant}"] = _samples(
            _min_p, "min_p", of_rows=_of_rows
        )
for _name, _definition in _SAMPLERS.items():
    _is_one = _name.startswith(("top_k_sampling", "min_p"))
    for _variant in ("",) if _is_one else ("", "_without_valid", "_of_numbers"):
        defines(_name + _variant)(_definition)


@defines("sampling_from_logits", "sampling_from_logits_of_numbers")
def _(a):
    """The greatest of logits and Gumbel noise; four logits, where as many fit, a subsequence."""
    tokens = []
    for i in range(len(a["output"])):
        logits = a["logits"][int(a["maybe_indices"][i]) if "maybe_indices" in a else i]
        width = math.gcd(4, len(logits))
        seed, offset = _seed(a)
        scores = []
        for j, x in enumerate(logits):
            first = np.array([i * len(logits) + j - j % width])
            drawn = float(uniforms(seed, first, offset, width)[0][j % width])
            scores.append(x - math.log(-math.log2(drawn * (1 - 2.0**-23))))
        tokens.append(scores.index(max(scores)))
    return {"output": np.array(tokens)}


@defines("chain_speculative_sampling", "chain_speculative_sampling_of_numbers")
def _(a):
    """Drafts are taken while a number times theirs is below the target's; then one more token."""
    found = {
        "output_token_ids": np.full(a["output_token_ids"].shape, -1),
        "output_accepted_token_num": a["output_accepted_token_num"].copy(),
        "output_emitted_draft_token_num": a["output_emitted_draft_token_num"].copy(),
    }
    for i, ids in enumerate(a["draft_token_ids"].astype(int)):
        numbers = _uniforms(a, i)
        taken = 0
        while taken < len(ids) and _is_taken(a, i, taken, next(numbers)):
            taken += 1
        rest = a["target_probs"][i, taken]
        accepted = taken
        if taken < len(ids):
            rest = np.maximum(rest - a["draft_probs"][i, taken], 0)
            accepted += sum(_is_taken(a, i, n, next(numbers)) for n in range(taken, len(ids)))
        chosen = [token for token, x in enumerate(rest) if x > 0]
        last = _first_past(rest, chosen, next(numbers) * math.fsum(rest))
        found["output_token_ids"][i, : taken + 1] = [*ids[:taken], last]
        found["output_accepted_token_num"][i] += accepted
        found["output_emitted_draft_token_num"][i] += taken
    return found


def _is_taken(a: dict, i: int, n: int, number: float) -> bool:
    token = int(a["draft_token_ids"][i, n])
    drafted = np.float32(number) * np.float32(a["draft_probs"][i, n, token])
    return float(drafted) < a["target_probs"][i, n, token]
