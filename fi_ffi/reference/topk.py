"""The `topk` module in numpy: the greatest of a row in order, ties by their index.

The kernels give them in an order of their own unless they are asked to sort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array

_LARGE = 2  # the code of a tie break


def _greatest(x: Array, k: int, tie_break: int) -> Array:
    """The indices of the k greatest, the greatest first."""
    values = x.astype(np.float64)
    index = np.arange(len(x))
    order: Array = np.lexsort((-index if tie_break == _LARGE else index, -values))
    return order[:k]


def radix_topk(
    input: Array, output_indices: Array, output_values: Array | None,
    maybe_row_states_buffer: Array | None, top_k: int, sorted_output: bool = False,
    deterministic: bool = False, tie_break: int = 0, dsa_graph_safe: bool = False,
) -> None:  # fmt: skip
    for i, x in enumerate(input):
        chosen = _greatest(x, top_k, tie_break)
        output_indices[i] = chosen
        if output_values is not None:
            output_values[i] = x[chosen]


def _windows(
    input: Array, lengths: Array, starts: Array | None, k: int, tie_break: int
) -> list[Array]:
    """For each row the indices chosen of its window, from 0 there; all of them, in order, where
    there are no more than k."""
    found = []
    for i, (x, length) in enumerate(zip(input, lengths, strict=True)):
        start = 0 if starts is None else int(starts[i])
        window = x[start : start + int(length)]
        short = len(window) <= k
        found.append(np.arange(len(window)) if short else _greatest(window, k, tie_break))
    return found


def radix_topk_page_table_transform(
    input: Array, output_page_table: Array, src_page_table: Array,
    maybe_row_to_batch: Array | None, lengths: Array, maybe_row_states_buffer: Array | None,
    top_k: int, deterministic: bool = False, tie_break: int = 0, dsa_graph_safe: bool = False,
    maybe_row_starts: Array | None = None, maybe_page_table_row_starts: Array | None = None,
    maybe_output_raw_indices: Array | None = None, *, page_size: int = 1,
) -> None:  # fmt: skip
    starts = maybe_row_starts
    if maybe_page_table_row_starts is not None:
        starts = maybe_page_table_row_starts
    output_page_table[...] = -1
    if maybe_output_raw_indices is not None:
        maybe_output_raw_indices[...] = -1
    windows = _windows(input, lengths, maybe_row_starts, top_k, tie_break)
    for i, chosen in enumerate(windows):
        table = src_page_table[i if maybe_row_to_batch is None else int(maybe_row_to_batch[i])]
        start = 0 if starts is None else int(starts[i])
        pages = table[start + chosen // page_size]
        output_page_table[i, : len(chosen)] = pages * page_size + chosen % page_size
        if maybe_output_raw_indices is not None:
            maybe_output_raw_indices[i, : len(chosen)] = chosen


def _with_page_size(*values: Any) -> None:
    """As it is from 0.6.18 on: the size of a page after the tie break."""
    *first, page_size = values[:10]
    radix_topk_page_table_transform(*first, *values[10:], page_size=page_size)


def radix_topk_ragged_transform(
    input: Array, output_indices: Array, offsets: Array, lengths: Array,
    maybe_row_states_buffer: Array | None, top_k: int, deterministic: bool = False,
    tie_break: int = 0, dsa_graph_safe: bool = False, maybe_row_starts: Array | None = None,
) -> None:  # fmt: skip
    output_indices[...] = -1
    windows = _windows(input, lengths, maybe_row_starts, top_k, tie_break)
    for i, chosen in enumerate(windows):
        output_indices[i, : len(chosen)] = chosen + offsets[i]


KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "topk": {
        "radix_topk": radix_topk,
        "radix_topk_page_table_transform": radix_topk_page_table_transform,
        "radix_topk_page_table_transform_with_page_size": _with_page_size,
        "radix_topk_ragged_transform": radix_topk_ragged_transform,
    }
}
