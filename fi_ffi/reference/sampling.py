"""Ops of `fi_ffi.ops.table.sampling`, from their definition.

A sampler's result is judged by what its random words and float32 rounding allow (`reachable.py`).
On the CPU, the result is what they allow without rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs, OneOfMany
from fi_ffi.reference.philox import uniforms
from fi_ffi.reference.reachable import NONE, Filter, around, rejected, slack, tokens_judge
from fi_ffi.reference.renorm import RENORM

_FEW = 16
_NUMBERS = "the first numbers of each output"
# Errors of `exp`, relative and by its argument; and the subnormal float32 numbers, which kernels
# compiled for fast arithmetic flush to 0.
_EXP, _ARGUMENT, _FLUSHED = 2.0**-20, 2.0**-22, 2.0**-126
# The number of subsequences at which kernels wrap around, and those computed at once here.
_SUBSEQUENCES, _AT_ONCE = np.uint64(2**32), 2**18
# The error of PTX's logarithm: absolute near 1, relative elsewhere.
_LOG = 2.0**-21


def softmax(a: Inputs) -> Exact:
    temperatures = a.get("maybe_temperature_arr", np.full(len(a["logits"]), a["temperature_val"]))
    temperatures = temperatures.ravel().astype(np.float32).astype(np.float64)[:, None]
    with np.errstate(invalid="ignore"):  # -inf * 0
        scaled = np.where(
            temperatures == 0,
            a["logits"] * 0,
            a["logits"] / np.where(temperatures, temperatures, 1),
        )
    greatest = scaled.max(axis=1, keepdims=True)
    powers = np.exp(scaled - greatest)
    value = powers / powers.sum(axis=1, keepdims=True)
    argument = np.where(powers > 0, np.abs(scaled) + np.abs(greatest), 0)
    return {"output": (value, (value * (_EXP + _ARGUMENT * argument) + _FLUSHED) / SLACK)}


def _numbers(a: Inputs, i: int) -> Iterator[float]:
    """Yield the random numbers of an output."""
    if _NUMBERS not in a:  # the first of all outputs at once
        every = np.arange(len(a["output"] if "output" in a else a["draft_token_ids"]))
        seeds, offsets = _words(a, "seed", every), _words(a, "offset", every)
        a[_NUMBERS] = uniforms(seeds, every, offsets, _FEW).astype(np.float64)
    yield from a[_NUMBERS][i]
    seed, offset = _word(a, "seed", i), _word(a, "offset", i)
    for start in count(offset + _FEW, _FEW):
        yield from uniforms(seed, np.array([i]), start, _FEW)[0].astype(np.float64)


def _word(a: Inputs, name: str, i: int) -> int:
    array = a.get(f"maybe_{name}_arr")
    if array is None:
        return int(a[f"{name}_val"] if f"{name}_val" in a else a[f"philox_{name}"])
    numbers = np.ravel(array)  # one element may have any rank
    return int(numbers[i if len(numbers) > 1 else 0])


# Returns the allowed tokens: `allowed(a, p, output's number, source's row, times)`. Sums may be off
# by `times * slack(p)`; `times` is 1, or 0 for the result without rounding.
Allowed = Callable[[Inputs, Array, int, int, float], Iterable[int]]


def _sampler(allowed: Allowed, source: str = "probs") -> Formula:
    def formula(a: Inputs) -> Exact:
        def at(i: int, times: float = 1.0) -> Iterable[int]:
            of = i if a.get("maybe_indices") is None else int(a["maybe_indices"][i])
            row = _flushed(a[source][of]) if source == "probs" else a[source][of]
            return allowed(a, row, i, of, times)

        @functools.cache
        def drawn() -> Array:
            return np.array([next(iter(at(i, 0.0)), NONE) for i in range(len(a["output"]))], int)

        made = {"output": OneOfMany(lambda: np.maximum(drawn(), 0), tokens_judge(at))}
        if "valid" in a:
            judge = tokens_judge(at, valid=True)
            made["valid"] = OneOfMany(lambda: drawn() != NONE, judge)
        return made

    return formula


def _flushed(p: Array) -> Array:
    """Replace subnormal float32 numbers by 0, as the kernels do."""
    return np.where(np.abs(p) < _FLUSHED, 0.0, p)


def _drawn(p: Array, chosen: Array, at: float, within: float) -> list[int]:
    return [token for _, token in around(p, chosen, at, within)] or [NONE]


def _from_probs(a: Inputs, p: Array, i: int, _: int, times: float) -> Iterable[int]:
    return _drawn(p, p > 0, next(_numbers(a, i)), times * slack(p))


def _top(a: Inputs, name: str, at: int) -> float:
    array = a.get(f"maybe_{name}_arr")
    return float(a[f"{name}_val"] if array is None else array[at])


def _top_k(a: Inputs, p: Array, i: int, at: int, times: float) -> Iterable[int]:
    kept = Filter(p, int(_top(a, "top_k", at)), np.inf, times * slack(p))
    return rejected(p, kept, _numbers(a, i))


def _top_p(a: Inputs, p: Array, i: int, at: int, times: float) -> Iterable[int]:
    top_p = float(np.float32(_top(a, "top_p", at)))
    return rejected(p, Filter(p, np.inf, top_p, times * slack(p)), _numbers(a, i))


def _top_k_top_p(a: Inputs, p: Array, i: int, at: int, times: float) -> Iterable[int]:
    k, top_p = int(_top(a, "top_k", at)), float(np.float32(_top(a, "top_p", at)))
    return rejected(p, Filter(p, k, top_p, times * slack(p)), _numbers(a, i))


def _min_p(a: Inputs, p: Array, i: int, at: int, times: float) -> Iterable[int]:
    greatest = np.float32(max(0.0, np.nanmax(p, initial=0.0)))
    chosen = p >= float(greatest * np.float32(_top(a, "min_p", at)))
    mass = float(p[chosen].sum())
    if not mass:  # all are 0, the greatest too: the kernel takes the last
        return np.flatnonzero(chosen)[-1:].tolist() or [NONE]
    return _drawn(p, chosen, next(_numbers(a, i)) * mass, 2 * times * slack(p))


def _by_output(allowed: Allowed) -> Allowed:
    """Use an array of parameters that is indexed by output, not by row of probs."""
    return lambda a, p, i, of, times: allowed(a, p, i, i, times)


def _from_logits(a: Inputs, logits: Array, i: int, _: int, times: float) -> Iterable[int]:
    size = len(logits)
    width = int(np.gcd(4, size))
    vectors = (np.arange(0, size, width, dtype=np.uint64) + np.uint64(i * size)) % _SUBSEQUENCES
    drawn = uniforms(_word(a, "seed", i), vectors, _word(a, "offset", i), width)
    inner = -np.log2(drawn.ravel().astype(np.float64) * (1 - 2.0**-23))
    score = logits - np.log(inner)
    if np.isnan(score).any() or not np.isfinite(score).any():
        return range(size)
    # The error of the outer logarithm's argument, then its own. An argument as small as its error
    # may be 0.
    wrong = np.minimum(times * _LOG / inner, 1)
    error = times * _LOG * (4 + np.abs(np.where(np.isfinite(score), score, 0)))
    with np.errstate(divide="ignore"):
        most = score - np.log1p(-wrong) + error
    least = np.where(wrong < 1, score - np.log1p(wrong) - error, -np.inf)
    may: list[int] = np.flatnonzero(np.isfinite(score) & (most >= least.max())).tolist()
    return may


def sampling_from_logits(a: Inputs) -> Exact:
    """Sample by the Gumbel method. Beyond as many random numbers as a kernel counts, which would
    take too long here, draw each token with one number from the same distribution."""
    results = _sampler(_from_logits, "logits")(a)
    if len(a["output"]) * a["logits"].shape[1] <= int(_SUBSEQUENCES):
        return results
    judge: Any = results["output"]
    return {"output": OneOfMany(lambda: _with_one_number(a), judge)}


def _with_one_number(a: Inputs) -> Array:
    """Draw a token of each row's distribution for each output."""
    count, logits = len(a["output"]), a["logits"]
    of: Any = a.get("maybe_indices")
    rows = np.arange(count) if of is None else of.astype(int)
    drawn = [
        uniforms(_words(a, "seed", part), part, _words(a, "offset", part), 1)[:, 0]
        for part in np.array_split(np.arange(count), -(-count // _AT_ONCE))
    ]
    numbers = np.concatenate(drawn).astype(np.float64)
    tokens = np.zeros(count, int)
    for row in np.unique(rows):
        with np.errstate(invalid="ignore"):
            sums = np.cumsum(np.exp(logits[row] - np.nanmax(logits[row])))
        at = rows == row
        # A number of 1 means the last token with any probability.
        tokens[at] = np.searchsorted(sums, numbers[at] * sums[-1], side="left")
    return tokens


def _words(a: Inputs, name: str, outputs: Array) -> Any:
    """Return what `_word` returns, for several outputs."""
    array = a.get(f"maybe_{name}_arr")
    numbers = np.zeros(0) if array is None else np.ravel(array)
    return numbers[outputs] if len(numbers) > 1 else _word(a, name, 0)


def _is_taken(drawn: float, drafted: float, wanted: float, times: float) -> set[bool]:
    product = float(np.float32(drawn) * np.float32(drafted))
    close = bool(times) and abs(product - wanted) <= times * 2.0**-23 * wanted
    return {True, False} if close else {product < wanted}


def _chain_row(a: Inputs, i: int, times: float = 1.0) -> set[tuple[int, int, int]]:
    """Return the possible results: tokens emitted, tokens accepted, and the token after those
    emitted."""
    ids, numbers = a["draft_token_ids"][i].astype(int), _numbers(a, i)
    length = len(ids)
    drawn = [next(numbers) for _ in range(length + 2)]
    found = set()

    def taken(n: int, number: int) -> set[bool]:
        drafts, targets = _flushed(a["draft_probs"][i, n]), _flushed(a["target_probs"][i, n])
        return _is_taken(drawn[number], drafts[ids[n]], targets[ids[n]], times)

    for emitted in range(length + 1):
        rest = _flushed(a["target_probs"][i, emitted])
        accepted, number = {emitted}, emitted
        if emitted < length:
            rest = np.maximum(_flushed(rest - _flushed(a["draft_probs"][i, emitted])), 0)
            if False in taken(emitted, number):
                for n in range(emitted, length):
                    number += 1
                    accepted = {so + yes for so in accepted for yes in taken(n, number)}
                number += 1
            else:
                accepted = set()
        mass = drawn[number] * float(rest.sum())
        tokens = _drawn(rest, rest > 0, mass, 2 * times * slack(rest))
        found |= {(emitted, so, token) for so in accepted for token in tokens}
        if emitted < length and True not in taken(emitted, emitted):
            break
    return found


def chain_speculative_sampling(a: Inputs) -> Exact:
    ids = a["draft_token_ids"].astype(int)

    @functools.cache
    def at(i: int, times: float = 1.0) -> set[tuple[int, int, int]]:
        return _chain_row(a, i, times)

    # The row of each tensor, from (emitted, accepted, token).
    def tokens(i: int, found: tuple[int, int, int]) -> list[int]:
        padding = [-1] * ids.shape[1]
        return [*ids[i, : found[0]], found[2], *padding[found[0] :]]

    def accepted(i: int, found: tuple[int, int, int]) -> int:
        return int(a["output_accepted_token_num"][i]) + found[1]

    def emitted(i: int, found: tuple[int, int, int]) -> int:
        return int(a["output_emitted_draft_token_num"][i]) + found[0]

    def made(of: Callable[[int, tuple[int, int, int]], Any]) -> OneOfMany:
        def judge(got: Array) -> tuple[float, float]:
            right = all(
                any(np.array_equal(one, of(i, found)) for found in at(i))
                for i, one in enumerate(got)
            )
            return (0.0, 0.0) if right else (np.inf, np.inf)

        return OneOfMany(lambda: np.array([of(i, min(at(i, 0.0))) for i in range(len(ids))]), judge)

    return {
        "output_token_ids": made(tokens),
        "output_accepted_token_num": made(accepted),
        "output_emitted_draft_token_num": made(emitted),
    }


_ALLOWED: dict[str, Allowed] = {
    "sampling_from_probs": _from_probs,
    "top_k_sampling_from_probs": _by_output(_top_k),
    "top_p_sampling_from_probs": _top_p,
    "top_k_top_p_sampling_from_probs": _top_k_top_p,
    "min_p_sampling_from_probs": _by_output(_min_p),
}
_FORMULAS: dict[str, Formula] = {
    **{name: _sampler(allowed) for name, allowed in _ALLOWED.items()},
    "sampling_from_logits": sampling_from_logits,
    "chain_speculative_sampling": chain_speculative_sampling,
}
_VARIANTS = ("", "_without_valid", "_of_numbers")
EXACT: dict[str, Formula] = {
    "softmax": softmax,
    **RENORM,
    **{name + variant: formula for name, formula in _FORMULAS.items() for variant in _VARIANTS},
    "top_k_sampling_from_probs_by_row": _sampler(_top_k),
    "min_p_sampling_from_probs_by_row": _sampler(_min_p),
}
