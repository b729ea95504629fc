"""Ops of `fi_ffi.ops.table.topk`, from their definition.

Without a tie break, any of equal values may be chosen, in any order. With one, the order is that of
the indices (or of values, if sorted); from 0.6.18 on, only for deterministic calls. A row that is
chosen whole is in order too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Exact, Formula, Inputs, OneOfMany

_SMALL, _LARGE = 1, 2


class Choice:
    """The k greatest of a row: those that must be chosen, and those that tie for the last
    places."""

    def __init__(
        self, x: Array, k: int, tie_break: int, is_sorted: bool = False, is_ordered: bool = True
    ) -> None:
        """Choose; `is_ordered` says whether a tie break fixes the order as well."""
        index = np.arange(len(x))
        # The greatest first; of equal ones the first, or with that tie break the last.
        order = np.lexsort((-index if tie_break == _LARGE else index, -x))[:k]
        # Sorted by index, then stably by value if the call sorts.
        is_ordered &= tie_break in (_SMALL, _LARGE)
        self.is_in_order = is_ordered or (k == len(x) and not is_sorted)
        if self.is_in_order:
            order = np.sort(order)
            order = order[np.argsort(-x[order], kind="stable")] if is_sorted else order
        self.order = order
        last = np.partition(x, len(x) - k)[len(x) - k]
        self.certain, self.tied = np.flatnonzero(x > last), np.flatnonzero(x == last)
        self.open = k - len(self.certain)
        if tie_break in (_SMALL, _LARGE):
            chosen = self.tied[: self.open] if tie_break == _SMALL else self.tied[-self.open :]
            self.certain = np.concatenate([self.certain, chosen])
            self.tied, self.open = chosen[:0], 0

    def allows(self, got: Array, names: Array) -> bool:
        """Whether these are the chosen elements, named by `names`, in an allowed order."""
        if self.is_in_order:
            return np.array_equal(got, names[self.order])
        there = Counter(got.astype(np.int64).tolist())
        wanted = Counter(names[self.certain].tolist())
        others = there - wanted
        tied = Counter(names[self.tied].tolist())
        return not (wanted - there or others - tied) and others.total() == self.open


def _every(count: int, is_right: Callable[[int], bool]) -> tuple[float, float]:
    """Return a judge's answer; nothing is rounded here."""
    right = all(is_right(i) for i in range(count))
    return (0.0, 0.0) if right else (np.inf, np.inf)


def _is_ordered(a: Inputs, with_tie_breaks: bool) -> bool:
    return with_tie_breaks or bool(a.get("deterministic"))


def radix_topk(a: Inputs, with_tie_breaks: bool = True) -> Exact:
    x, k, tie_break = a["input"], a["output_indices"].shape[1], a.get("tie_break", 0)
    names = np.arange(x.shape[1])
    is_sorted, is_ordered = a.get("sorted_output", False), _is_ordered(a, with_tie_breaks)

    def chosen() -> Array:
        orders = [Choice(row, k, tie_break, is_sorted).order for row in x]
        return np.reshape(orders, (len(x), k)).astype(np.int64)

    def indices(got: Array) -> tuple[float, float]:
        def is_right(i: int) -> bool:
            if not Choice(x[i], k, tie_break, is_sorted, is_ordered).allows(got[i], names):
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

    results = {"output_indices": OneOfMany(chosen, indices)}
    for name in ("output_values", "maybe_output_values"):  # the name depends on the release
        if name in a:
            results[name] = OneOfMany(lambda: np.take_along_axis(x, chosen(), axis=1), values)
    return results


Rows = Iterator[tuple[Array, Array]]


def _chosen(a: Inputs, output: str, rows: Callable[[], Rows], with_tie_breaks: bool) -> OneOfMany:
    """Judge rows that are windows, with the names of a window's elements."""
    is_ordered = _is_ordered(a, with_tie_breaks)
    (count, k), tie_break = a[output].shape, a.get("tie_break", 0)

    def padded(names: Array) -> Array:
        return np.concatenate([names, np.full(k - len(names), -1)])

    def value() -> Array:
        found = np.full((count, k), -1)
        for i, (window, names) in enumerate(rows()):
            chosen = names if len(window) <= k else names[Choice(window, k, tie_break).order]
            found[i] = padded(chosen)
        return found

    def judge(got: Array) -> tuple[float, float]:
        windows = list(rows())

        def is_right(i: int) -> bool:
            window, names = windows[i]
            if len(window) <= k:
                return np.array_equal(got[i], padded(names))
            return Choice(window, k, tie_break, False, is_ordered).allows(got[i], names)

        return _every(count, is_right)

    return OneOfMany(value, judge)


def _starts(a: Inputs, *names: str) -> Array:
    of_rows: Any = next((a[name] for name in names if a.get(name) is not None), None)
    starts: Array = np.zeros(len(a["lengths"])) if of_rows is None else of_rows
    return starts.astype(int)


def _windows(a: Inputs) -> Iterator[Array]:
    lengths = a["lengths"].astype(int)
    for x, start, length in zip(a["input"], _starts(a, "maybe_row_starts"), lengths, strict=True):
        yield x[start : start + length]


def radix_topk_page_table_transform(a: Inputs, with_tie_breaks: bool = True) -> Exact:
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

    results = {"output_page_table": _chosen(a, "output_page_table", rows, with_tie_breaks)}
    if "maybe_output_raw_indices" in a:
        results["maybe_output_raw_indices"] = _chosen(
            a, "maybe_output_raw_indices", raw, with_tie_breaks
        )
    return results


def radix_topk_ragged_transform(a: Inputs, with_tie_breaks: bool = True) -> Exact:
    offsets = a["offsets"].astype(np.int64)

    def rows() -> Rows:
        for window, offset in zip(_windows(a), offsets, strict=True):
            yield window, offset + np.arange(len(window))

    return {"output_indices": _chosen(a, "output_indices", rows, with_tie_breaks)}


def _without_tie_break_order(formula: Callable[[Inputs, bool], Exact]) -> Formula:
    """Return the formula of releases in which a tie break does not fix the order."""
    return lambda a: formula(a, False)


EXACT: dict[str, Formula] = {
    "radix_topk": radix_topk,
    "radix_topk_in_any_order": _without_tie_break_order(radix_topk),
    "radix_topk_page_table_transform": radix_topk_page_table_transform,
    "radix_topk_page_table_transform_with_page_size": _without_tie_break_order(
        radix_topk_page_table_transform
    ),
    "radix_topk_ragged_transform": radix_topk_ragged_transform,
    "radix_topk_ragged_transform_in_any_order": _without_tie_break_order(
        radix_topk_ragged_transform
    ),
}
