"""The `sampling` module in numpy: the kernels' own algorithms, from the same random words.

Sums are in float64, where the kernels' are in float32 in an order of their own: a token that lies
at the edge of another can differ.  `exact_sampling.py` judges with that in mind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from fi_ffi.reference.arrays import Array, store
from fi_ffi.reference.philox import uniforms
from fi_ffi.reference.renorm import RENORM

_HALF = np.float32(0.5)
# Words that are made at a time: few rows need more rounds.
_AT_ONCE = 8
# The logarithms' factor, and what keeps 1 itself out, as the kernel has them.
_LN2, _BELOW_ONE = float(np.float32(0.6931471806)), 1 - 2.0**-23


def softmax(
    workspace_buffer: Array, logits: Array, output: Array, maybe_temperature_arr: Array | None,
    temperature_val: float, enable_pdl: bool,
) -> None:  # fmt: skip
    """Logits at a temperature of 0 are multiplied by 0, as the kernel does."""
    given = temperature_val if maybe_temperature_arr is None else maybe_temperature_arr
    temperature = np.broadcast_to(np.asarray(given, np.float32), len(logits))
    inverse = np.where(temperature == 0, np.float32(0), np.float32(1) / temperature)
    scaled = (logits * inverse[:, None]).astype(np.float64)
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    store(output, powers / powers.sum(axis=1, keepdims=True))


def _pick(p: Array, chosen: Array, at: float) -> int:
    """The first of the chosen at which their running sum exceeds `at`, else the last of them;
    -1 where none is chosen."""
    running = np.cumsum(np.where(chosen, p, 0), dtype=np.float64)
    found = int(np.searchsorted(running, at, side="right"))
    if found < len(p):
        return found
    last = np.flatnonzero(chosen)
    return int(last[-1]) if len(last) else -1


class _Row:
    """An output's random numbers, one after another."""

    def __init__(self, number: int, seed: int, offset: int) -> None:
        self._number, self._seed, self._offset = np.array([number]), seed, offset
        self._drawn = self._draw()

    def _draw(self) -> Iterator[Any]:
        while True:
            yield from uniforms(self._seed, self._number, self._offset, _AT_ONCE)[0]
            self._offset += _AT_ONCE

    def draw(self) -> Any:
        return next(self._drawn)


def _rejecting(p: Array, row: _Row, k: int, top_p: Any) -> int:
    """Draw, and draw again above a rising pivot, until fewer than `k` and less than `top_p` are
    above what was drawn."""
    low, high, q = np.float32(0), np.float32(1), np.float32(1)

    def above(pivot: Any) -> tuple[bool, Any]:
        chosen = p > pivot
        total = np.float32(p[chosen].sum(dtype=np.float64))
        return bool(chosen.sum() < k and total < top_p), total

    while True:
        token = _pick(p, p > low, row.draw() * q)
        if token < 0:
            return -1
        first = p[token]
        second = (first + high) * _HALF
        (is_right, of_first), (is_enough, of_second) = above(first), above(second)
        if is_right:
            return token
        low, high, q = (first, second, of_first) if is_enough else (second, high, of_second)
        if not low < high:
            return token


# Every sampler's random numbers, at the end of its arguments.
_Seeds: TypeAlias = "tuple[Array | None, int, Array | None, int]"


def _rows(count: int, seeds: _Seeds) -> Iterator[_Row]:
    seed_arr, seed, offset_arr, offset = seeds
    for i in range(count):
        yield _Row(i, _word(seed_arr, seed, i), _word(offset_arr, offset, i))


def _of(array: Array | None, number: Any, i: int) -> Any:
    return number if array is None else array[i]


def _word(array: Array | None, number: int, i: int) -> int:
    """Of an array of one, all rows have that."""
    return int(_of(array, number, i if array is not None and len(array) > 1 else 0))


def _sample(
    probs: Array, output: Array, valid: Array, indices: Array | None, seeds: _Seeds,
    choose: Callable[[Array, _Row, int, int], int],
) -> None:  # fmt: skip
    """`choose(p, row, output's number, probs' row)` for each output."""
    for i, row in enumerate(_rows(len(output), seeds)):
        of = i if indices is None else int(indices[i])
        token = choose(probs[of], row, i, of)
        output[i], valid[i] = max(token, 0), token >= 0


def sampling_from_probs(
    probs: Array, output: Array, valid: Array, maybe_indices: Array | None, deterministic: bool,
    *seeds: Any,
) -> None:  # fmt: skip
    def choose(p: Array, row: _Row, *_: int) -> int:
        return _pick(p, p > 0, row.draw())

    _sample(probs, output, valid, maybe_indices, seeds, choose)


def top_k_sampling_from_probs(
    probs: Array, output: Array, valid: Array, maybe_indices: Array | None,
    maybe_top_k_arr: Array | None, top_k_val: int, deterministic: bool, *seeds: Any,
    by_row: bool = False,
) -> None:  # fmt: skip
    """`by_row`: an array is of the rows of probs, and not of the outputs."""

    def choose(p: Array, row: _Row, i: int, of: int) -> int:
        k = _of(maybe_top_k_arr, top_k_val, of if by_row else i)
        return _rejecting(p, row, int(k), np.inf)

    _sample(probs, output, valid, maybe_indices, seeds, choose)


def top_p_sampling_from_probs(
    probs: Array, output: Array, valid: Array, maybe_indices: Array | None,
    maybe_top_p_arr: Array | None, top_p_val: float, deterministic: bool, *seeds: Any,
) -> None:  # fmt: skip
    def choose(p: Array, row: _Row, i: int, of: int) -> int:
        return _rejecting(p, row, len(p) + 1, np.float32(_of(maybe_top_p_arr, top_p_val, of)))

    _sample(probs, output, valid, maybe_indices, seeds, choose)


def top_k_top_p_sampling_from_probs(
    probs: Array, output: Array, valid: Array, maybe_indices: Array | None,
    maybe_top_k_arr: Array | None, top_k_val: float, maybe_top_p_arr: Array | None,
    top_p_val: float, deterministic: bool, *seeds: Any,
) -> None:  # fmt: skip
    def choose(p: Array, row: _Row, i: int, of: int) -> int:
        k, top_p = _of(maybe_top_k_arr, top_k_val, of), _of(maybe_top_p_arr, top_p_val, of)
        return _rejecting(p, row, int(k), np.float32(top_p))

    _sample(probs, output, valid, maybe_indices, seeds, choose)


def min_p_sampling_from_probs(
    probs: Array, output: Array, valid: Array, maybe_indices: Array | None,
    maybe_min_p_arr: Array | None, min_p_val: float, deterministic: bool, *seeds: Any,
    by_row: bool = False,
) -> None:  # fmt: skip
    def choose(p: Array, row: _Row, i: int, of: int) -> int:
        min_p = np.float32(_of(maybe_min_p_arr, min_p_val, of if by_row else i))
        chosen = p >= np.fmax.reduce(p, initial=np.float32(0)) * min_p
        return _pick(p, chosen, row.draw() * np.float32(p[chosen].sum(dtype=np.float64)))

    _sample(probs, output, valid, maybe_indices, seeds, choose)


def sampling_from_logits(
    logits: Array, output: Array, maybe_indices: Array | None, deterministic: bool, *seeds: Any
) -> None:
    """The greatest of logits and Gumbel noise; each vector that the kernel loads has its own
    subsequence."""
    size = logits.shape[1]
    width = int(np.gcd(4, size))
    seed_arr, seed, offset_arr, offset = seeds
    for i in range(len(output)):
        of = i if maybe_indices is None else int(maybe_indices[i])
        vectors = np.arange(0, size, width, dtype=np.uint64) + np.uint64(i * size)
        words = _word(seed_arr, seed, i), _word(offset_arr, offset, i)
        drawn = uniforms(words[0], vectors, words[1], width)
        noise = -_LN2 * np.log2(-np.log2(drawn.ravel().astype(np.float64) * _BELOW_ONE))
        output[i] = np.argmax(logits[of] + noise)


def chain_speculative_sampling(
    draft_probs: Array, draft_token_ids: Array, target_probs: Array, output_token_ids: Array,
    output_accepted_token_num: Array, output_emitted_draft_token_num: Array, deterministic: bool,
    *seeds: Any,
) -> None:  # fmt: skip
    count = draft_token_ids.shape[1]
    for i, row in enumerate(_rows(len(draft_token_ids), seeds)):
        tokens = draft_token_ids[i]

        def is_taken(n: int, i: int = i, row: _Row = row, tokens: Array = tokens) -> bool:
            drafted, wanted = draft_probs[i, n, tokens[n]], target_probs[i, n, tokens[n]]
            return bool(row.draw() * drafted < wanted)

        emitted = next((n for n in range(count) if not is_taken(n)), count)
        # The one that was refused is looked at again, with another number.
        accepted = emitted + sum([is_taken(n) for n in range(emitted, count)])
        rest = target_probs[i, emitted]
        if emitted < count:
            rest = np.maximum(rest - draft_probs[i, emitted], np.float32(0))
        total = np.float32(rest.sum(dtype=np.float64))
        output_token_ids[i] = -1
        output_token_ids[i, :emitted] = tokens[:emitted]
        output_token_ids[i, emitted] = _pick(rest, rest > 0, row.draw() * total)
        output_accepted_token_num[i] += accepted
        output_emitted_draft_token_num[i] += emitted


def _without_valid(kernel: Callable[..., None]) -> Callable[..., None]:
    """As it was up to 0.6.6: no flags of what is valid."""

    def run(probs: Array, output: Array, *others: Any) -> None:
        kernel(probs, output, np.empty(len(output), np.bool_), *others)

    return run


def _of_numbers(kernel: Callable[..., None]) -> Callable[..., None]:
    """As it was in 0.6.3: a seed and an offset that are numbers."""

    def run(*values: Any) -> None:
        *others, seed, offset = values
        kernel(*others, None, seed, None, offset)

    return run


_SAMPLERS = (
    sampling_from_probs,
    top_k_sampling_from_probs,
    top_p_sampling_from_probs,
    top_k_top_p_sampling_from_probs,
    min_p_sampling_from_probs,
)
_OTHERS = (sampling_from_logits, chain_speculative_sampling)
_ENTRIES: dict[str, Callable[..., None]] = {"softmax": softmax, **RENORM}
for _kernel in (*_SAMPLERS, *_OTHERS):
    _first = _without_valid(_kernel) if _kernel in _SAMPLERS else _kernel
    _ENTRIES |= {
        _kernel.__name__: _kernel,
        f"{_kernel.__name__}_without_valid": _first,
        f"{_kernel.__name__}_of_numbers": _of_numbers(_first),
    }
for _kernel in (top_k_sampling_from_probs, min_p_sampling_from_probs):
    _ENTRIES[f"{_kernel.__name__}_by_row"] = functools.partial(_kernel, by_row=True)

KERNELS: dict[str, dict[str, Callable[..., None]]] = {"sampling": _ENTRIES}
