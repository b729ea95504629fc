"""The greatest of each row: entries of FlashInfer's `topk` module.

What the rows demand beyond the bindings' own checks follows `include/flashinfer/topk.cuh`.  Either
a block takes a row, for which it has room to choose 2048 elements at most, or blocks share rows as
in `renorm.py`: which, FlashInfer decides by sizes and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.abi.tensor import DTYPES
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import SHARED_MEMORY, Arg, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table.renorm import ROW_STATES, rule_of_shared_rows

_SOURCE = "csrc/flashinfer_topk_binding.cu"
_INT = 2**31 - 1
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_MAYBE: dict[str, Any] = {"optional": True, "contiguous": True}
_INDEX: dict[str, Any] = {"dtype": "int32", "contiguous": True}
# What a block that has a row to itself can choose, and what can be sorted.
MOST_CHOSEN = 2048

_STATES = replace(ROW_STATES, name="maybe_row_states_buffer", optional=True)
_INPUT = Tensor("input", "n d", "T", "rows to choose from, none of them NaN", contiguous=True)
_TOP_K = Scalar("top_k", int, None, "how many are chosen", low=0, high=_INT, size_of="top_k")
_SORTED = Scalar("sorted_output", bool, False, "the greatest first; of 2048 at most", since="0.6.8")
_DETERMINISTIC = Scalar(
    "deterministic", bool, False, "the same in the same order each time", since="0.6.8"
)
_TIE_BREAK = Scalar(
    "tie_break", int, 0,
    "which of equal ones share the last places: 0 any, 1 those of the smallest indices, 2 of the "
    "largest, each of 2048 at most; and then it is deterministic", low=0, high=2,
    since="0.6.9",
)  # fmt: skip
_GRAPH_SAFE = Scalar(
    "dsa_graph_safe", bool, False,
    "one kernel whatever the sizes are, for graphs that are replayed with others; of 2048 at most",
    since="0.6.10",
)  # fmt: skip


def _at_most(option: Scalar) -> Rule:
    return Rule(
        "top_k",
        f"not {option.name} or top_k <= {MOST_CHOSEN}",
        f"{MOST_CHOSEN} at most with `{option.name}`",
        since=option.since,
    )


# Of the outputs, elements are counted in 32 bits.
_LIMITS = ("d >= 1", f"n * top_k <= {2**32 - 1}", f"d <= {_INT}", f"n <= {_INT}")


def _forms(
    name: str, doc: str, *args: Arg, requires: tuple[str | Rule, ...] = (),
    later: Mapping[str, Mapping[str, Any]] | None = None, **more: Any,
) -> tuple[Row, ...]:  # fmt: skip
    limited = [_at_most(o) for o in (_SORTED, _TIE_BREAK, _GRAPH_SAFE) if o in args]
    row = Row(
        name, "topk", name, _SOURCE, doc, args, {"T": ("float32", "float16", "bfloat16")},
        releases=">=0.6.3",
        vector=Vector(("d",), dtype="T"),
        offset_limit=2**63,
        requires=(*_LIMITS, rule_of_shared_rows("input", "d"), *limited, *requires),
        **more,
    )  # fmt: skip
    return forms_of(row, later)


_INDICES = Tensor("output_indices", "n top_k", doc="where they are in their rows",
                  writes=True, reads=False, **_INDEX)  # fmt: skip
_VALUES = Tensor("output_values", "n top_k", "T", "what they are", until="0.6.18", **_OUT)
_MAYBE_VALUES = replace(
    _VALUES, name="maybe_output_values", optional=True, since=_VALUES.until, until=""
)

_LENGTHS = Tensor("lengths", "n", doc="how many elements of each row there are to choose from",
                  **_INDEX)  # fmt: skip
_STARTS = Tensor("maybe_row_starts", "n", "int32",
                 "where in each row they start; without it, at 0",
                 since="0.6.10", **_MAYBE)  # fmt: skip
_PAGES_DOC = (
    "Choose the `top_k` greatest elements of each row's first `lengths`, and give what a page "
    "table has in their places: `src_page_table[batch, start + index]`.  Of a row that has no more "
    "than `top_k`, all are given, in order, and then -1."
)
_TABLE_FOR_EACH = Rule(
    "src_page_table",
    "maybe_row_to_batch or n <= b",
    "a page table for each row, unless there is `maybe_row_to_batch`",
)
# Of a block's shared memory, what is not the row's; and what the kernel of whole rows needs.
_OF_THE_BLOCK, _OF_WHOLE_ROWS = 2080, 128 << 10


def _is_in_order(
    n: int, d: int, k: int, dtype: str, shared: int, deterministic: bool | None,
    tie_break: int | None, graph_safe: bool | None,
) -> bool:  # fmt: skip
    """Whether no block reads an index before another has written it.

    Blocks that share a row put indices in its place, wait for each other, and read them as
    pages; but a block says that it is done when its first thread is, unless it is
    deterministic.  `ShouldUseFilteredTopK` tells when a block has a row to itself.
    """
    size = DTYPES[dtype].itemsize
    if deterministic or tie_break or graph_safe or d * size <= shared - _OF_THE_BLOCK:
        return True
    limit = 32768 if size == 4 else 16384
    is_whole = d <= limit or (size == 4 and n > d // 16384)
    return is_whole and k <= MOST_CHOSEN and shared >= _OF_WHOLE_ROWS


_IN_ORDER = Rule(
    "deterministic",
    f"is_in_order(n, d, top_k, T, {SHARED_MEMORY}, deterministic, tie_break, dsa_graph_safe)",
    "True for rows that several blocks share: else they race, and entries are wrong",
    {"is_in_order": _is_in_order},
)
_PAGE_STARTS = Tensor("maybe_page_table_row_starts", "n", "int32",
                      "where in the page tables they start; without it, where in the rows",
                      since="0.6.17", **_MAYBE)  # fmt: skip
_PAGED = "0.6.18"  # since then an entry of a page table is of several elements of a row
_PAGE_SIZE = Scalar(
    "page_size", int, 1, "elements of a row for each entry of the page table, a power of 2; then "
    "`table[start + index // page_size] * page_size + index % page_size` is given", low=1,
    high=2**30, since=_PAGED,
)  # fmt: skip
_RAW = Tensor("maybe_output_raw_indices", "n top_k", doc="gets the indices in the rows",
              writes=True, reads=False, optional=True, since=_PAGED, **_INDEX)  # fmt: skip
# Since then a tie break alone says nothing of the order (also where there are page tables).
_IN_ANY_ORDER = {"0.6.18": {"variant": "_in_any_order"}}
_LONG_TABLES = (
    Rule("src_page_table", "m >= d", "m of at least d", until=_PAGED),
    Rule("src_page_table", "m * page_size >= d", "m * page_size of at least d", since=_PAGED),
)

ROWS = (
    *_forms(
        "radix_topk",
        "Choose the `top_k` greatest elements of each row, in any order unless `sorted_output` is "
        "set.",
        _INPUT, _INDICES, _VALUES, _MAYBE_VALUES, _STATES, _TOP_K,
        _SORTED, _DETERMINISTIC, _TIE_BREAK, _GRAPH_SAFE,
        requires=("d >= top_k",),
        later=_IN_ANY_ORDER,
    ),
    *_forms(
        "radix_topk_page_table_transform",
        _PAGES_DOC,
        _INPUT,
        Tensor("output_page_table", "n top_k", doc="what the page table has", writes=True,
               reads=False, **_INDEX),
        Tensor("src_page_table", "b m", doc="page tables, at least as long as the rows", **_INDEX),
        Tensor("maybe_row_to_batch", "n", "int32",
               "the page table of each row; without it, its own", **_MAYBE),
        _LENGTHS, _STATES, _TOP_K,
        _DETERMINISTIC, _TIE_BREAK, _PAGE_SIZE, _GRAPH_SAFE, _STARTS, _PAGE_STARTS, _RAW,
        requires=("n == 0 or b >= 1", *_LONG_TABLES, _TABLE_FOR_EACH, _IN_ORDER),
        later={_PAGED: {"variant": "_with_page_size"}},
        nothing_axis="n",
    ),
    *_forms(
        "radix_topk_ragged_transform",
        "Choose the `top_k` greatest elements of each row's first `lengths`, and give their "
        "indices there plus the row's offset.  Of a row that has no more than `top_k`, all are "
        "given, in order, and then -1.",
        _INPUT,
        _INDICES,
        Tensor("offsets", "n", doc="what is added to each row's indices", **_INDEX),
        _LENGTHS, _STATES, _TOP_K, _DETERMINISTIC, _TIE_BREAK, _GRAPH_SAFE, _STARTS,
        later=_IN_ANY_ORDER,
    ),
)  # fmt: skip
