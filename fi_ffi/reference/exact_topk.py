"""Ops of `fi_ffi.ops.table.topk`, from their definition: see exact.py.

Which of equal values are chosen is open unless a tie break says it, and so is the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs, Judge, Move

_SMALL, _LARGE = 1, 2


class Choice:
    """The k greatest of a row: those that must be chosen, and those that share the last places."""

    def __init__(self, x: Array, k: int, tie_break: int) -> None:
        last = np.partition(x, len(x) - k)[len(x) - k]
        self.certain, self.tied = np.flatnonzero(x > last), np.flatnonzero(x == last)
        self.open = k - len(self.certain)
        if tie_break in (_SMALL, _LARGE):
            chosen = self.tied[: self.open] if tie_break == _SMALL else self.tied[-self.open :]
            self.certain = np.concatenate([self.certain, chosen])
            self.tied, self.open = chosen[:0], 0

    def allows(self, got: Array, names: Array) -> bool:
        """Whether these are what the chosen ones are called by `names`, in any order."""
        there = Counter(got.astype(np.int64).tolist())
        wanted = Counter(names[self.certain].tolist())
        others = there - wanted
        tied = Counter(names[self.tied].tolist())
        return not (wanted - there or others - tied) and others.total() == self.open


def _every(count: int, is_right: Callable[[int], bool]) -> tuple[float, float]:
    """What a judge says: nothing here is rounded."""
    right = all(is_right(i) for i in range(count))
    return (0.0, 0.0) if right else (np.inf, np.inf)


def radix_topk(a: Inputs) -> Exact:
    x, k, tie_break = a["input"], a["output_indices"].shape[1], a.get("tie_break", 0)
    names = np.arange(x.shape[1])
    is_sorted = a.get("sorted_output", False)

    def indices(got: Array) -> tuple[float, float]:
        def is_right(i: int) -> bool:
            if not Choice(x[i], k, tie_break).allows(got[i], names):
                return False
            values = x[i][got[i].astype(np.int64)]
            return not is_sorted or bool((np.diff(values) <= 0).all())

        return _every(len(x), is_right)

    def values(got: Array) -> tuple[float, float]:
        greatest = -np.sort(-x, axis=1)[:, :k]
        found = got.astype(np.float64)
        if not is_sorted:
            found = -np.sort(-found, axis=1)
        return _every(len(x), lambda i: np.array_equal(found[i], greatest[i]))

    made: dict[str, Judge] = {"output_indices": indices}
    return made | ({"output_values": values} if "output_values" in a else {})


Rows = Iterator[tuple[Array, Array]]


def _judge(a: Inputs, rows: Callable[[], Rows], count: int) -> Judge:
    """Of rows that are windows, with what the elements of a window are called."""

    def judge(got: Array) -> tuple[float, float]:
        k, tie_break = got.shape[1], a.get("tie_break", 0)
        windows = list(rows())

        def is_right(i: int) -> bool:
            window, names = windows[i]
            if len(window) <= k:
                padding = np.full(k - len(window), -1)
                return np.array_equal(got[i], np.concatenate([names, padding]))
            return Choice(window, k, tie_break).allows(got[i], names)

        return _every(count, is_right)

    return judge


def _starts(a: Inputs, *names: str) -> Array:
    given: Any = next((a[name] for name in names if a.get(name) is not None), None)
    starts: Array = np.zeros(len(a["lengths"])) if given is None else given
    return starts.astype(int)


def _windows(a: Inputs) -> Iterator[Array]:
    lengths = a["lengths"].astype(int)
    for x, start, length in zip(a["input"], _starts(a, "maybe_row_starts"), lengths, strict=True):
        yield x[start : start + length]


def radix_topk_page_table_transform(a: Inputs) -> Exact:
    of = a.get("maybe_row_to_batch")
    batch = np.arange(len(a["lengths"])) if of is None else of.astype(int)
    starts = _starts(a, "maybe_page_table_row_starts", "maybe_row_starts")
    size = a.get("page_size", 1)

    def rows() -> Rows:
        for window, start, row in zip(_windows(a), starts, batch, strict=True):
            at = np.arange(len(window))
            pages = a["src_page_table"][row].astype(np.int64)[start + at // size]
            yield window, pages * size + at % size

    def raw() -> Rows:
        return ((window, np.arange(len(window))) for window in _windows(a))

    made = {"output_page_table": _judge(a, rows, len(batch))}
    if "maybe_output_raw_indices" in a:
        made["maybe_output_raw_indices"] = _judge(a, raw, len(batch))
    return made


def radix_topk_ragged_transform(a: Inputs) -> Exact:
    offsets = a["offsets"].astype(np.int64)

    def rows() -> Rows:
        for window, offset in zip(_windows(a), offsets, strict=True):
            yield window, offset + np.arange(len(window))

    return {"output_indices": _judge(a, rows, len(offsets))}


EXACT: dict[str, Formula] = {
    "radix_topk": radix_topk,
    "radix_topk_page_table_transform": radix_topk_page_table_transform,
    "radix_topk_page_table_transform_with_page_size": radix_topk_page_table_transform,
    "radix_topk_ragged_transform": radix_topk_ragged_transform,
}
MOVES: dict[str, Move] = {}
