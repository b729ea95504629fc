"""The greatest elements of each row: entries of FlashInfer's `topk` module.

The rows' requirements beyond the bindings' own checks follow `include/flashinfer/topk.cuh`. Either
a block takes a whole row, and can choose 2048 elements at most, or blocks share rows as in
`renorm.py`. FlashInfer decides by sizes and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.abi.tensor import DTYPES
from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import SHARED_MEMORY, Arg, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table.renorm import ROW_STATES, rule_of_shared_rows

_SOURCE = "csrc/flashinfer_topk_binding.cu"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_MAYBE: dict[str, Any] = {"optional": True, "contiguous": True}
_INDEX: dict[str, Any] = {"dtype": "int32", "contiguous": True}
# The most elements that a block with a whole row can choose, and that can be sorted.
MOST_CHOSEN = 2048

_STATES = replace(ROW_STATES, name="maybe_row_states_buffer", optional=True)
_INPUT = Tensor("input", "n d", "T", "rows to choose from, without NaN", contiguous=True)
_TOP_K = Scalar(
    "top_k", int, None, "number of chosen elements", low=0, high=INT32_MAX, size_of="top_k"
)
_SORTED = Scalar(
    "sorted_output", bool, False, "greatest first; for top_k up to 2048", since="0.6.8"
)
_DETERMINISTIC = Scalar(
    "deterministic", bool, False, "same elements in the same order each time", since="0.6.8"
)
_TIE_BREAK = Scalar(
    "tie_break",
    int,
    0,
    "choice among ties: 0 any, 1 smallest indices, 2 largest indices; 1 and 2 take top_k up to "
    "2048 and are deterministic",
    low=0,
    high=2,
    since="0.6.9",
)
_GRAPH_SAFE = Scalar(
    "dsa_graph_safe",
    bool,
    False,
    "same kernel for all sizes, for graphs that are replayed with others; top_k up to 2048",
    since="0.6.10",
)


def _at_most(option: Scalar) -> Rule:
    return Rule(
        "top_k",
        f"not {option.name} or top_k <= {MOST_CHOSEN}",
        f"{MOST_CHOSEN} at most with `{option.name}`",
        since=option.since,
    )


# The kernels count the outputs' elements in 32 bits.
_LIMITS = ("d >= 1", f"n * top_k <= {2**32 - 1}", f"d <= {INT32_MAX}", f"n <= {INT32_MAX}")


def _forms(
    name: str,
    doc: str,
    *args: Arg,
    requires: tuple[str | Rule, ...] = (),
    later: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> tuple[Row, ...]:
    limited = [_at_most(o) for o in (_SORTED, _TIE_BREAK, _GRAPH_SAFE) if o in args]
    row = Row(
        name,
        "topk",
        name,
        _SOURCE,
        doc,
        args,
        {"T": ("float32", "float16", "bfloat16")},
        releases=">=0.6.3",
        vector=Vector(("d",), dtype="T"),
        offset_limit=2**63,
        requires=(*_LIMITS, rule_of_shared_rows("input", "d"), *limited, *requires),
        **more,
    )
    return forms_of(row, later)


_INDICES = Tensor(
    "output_indices",
    "n top_k",
    doc="their indices in their rows",
    writes=True,
    reads=False,
    **_INDEX,
)
_VALUES = Tensor("output_values", "n top_k", "T", "their values", until="0.6.18", **_OUT)
_MAYBE_VALUES = replace(
    _VALUES, name="maybe_output_values", optional=True, since=_VALUES.until, until=""
)

_LENGTHS = Tensor(
    "lengths",
    "n",
    doc="number of elements of each row to choose from",
    index=("0 <= lengths <= d",),
    **_INDEX,
)
# What a row without elements has for the others is not used.
_USED = "where lengths > 0"
_STARTS = Tensor(
    "maybe_row_starts",
    "n",
    "int32",
    "their start in each row; default: 0",
    since="0.6.10",
    index=(f"0 <= maybe_row_starts <= d - lengths {_USED}",),
    **_MAYBE,
)
_PAGES_DOC = (
    "Choose the `top_k` greatest of each row's first `lengths` elements, and return their entries "
    "of a page table: `src_page_table[batch, start + index]`. A row with no more than `top_k` "
    "elements gives all of them, in order, then -1."
)
_TABLE_FOR_EACH = Rule(
    "src_page_table",
    "maybe_row_to_batch or n <= b",
    "a page table for each row, unless `maybe_row_to_batch` is given",
)
# Shared memory of a block beside the row, and the shared memory that the whole-row kernel needs.
_OF_THE_BLOCK, _OF_WHOLE_ROWS = 2080, 128 << 10


def _is_in_order(
    n: int,
    d: int,
    k: int,
    dtype: str,
    shared: int,
    deterministic: bool | None,
    tie_break: int | None,
    graph_safe: bool | None,
) -> bool:
    """Whether no block reads an index before another block has written it.

    Blocks that share a row put indices in the row's place, wait for each other, and read them as
    pages. But unless the call is deterministic, a block signals completion when its first thread is
    done. `ShouldUseFilteredTopK` decides when a block has a whole row.
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
_PAGED = "0.6.18"  # from here on, an entry of a page table covers several elements of a row
_PAGE_STARTS = Tensor(
    "maybe_page_table_row_starts",
    "n",
    "int32",
    "their start in the page tables; default: their start in the rows",
    since="0.6.17",
    until=_PAGED,
    index=(f"0 <= maybe_page_table_row_starts <= m - lengths {_USED}",),
    **_MAYBE,
)
_LAST_ENTRY = "(lengths - 1) // page_size"
_PAGED_STARTS = replace(
    _PAGE_STARTS,
    since=_PAGED,
    until="",
    index=(f"0 <= maybe_page_table_row_starts < m - {_LAST_ENTRY} {_USED}",),
)
# They are the starts in the page tables too, unless those are given.
_STARTS_OF_BOTH = replace(
    _STARTS,
    since=_PAGED,
    index=(
        *_STARTS.index,
        f"maybe_row_starts < m - {_LAST_ENTRY} where (lengths > 0) & "
        "(maybe_page_table_row_starts is None)",
    ),
)
_PAGE_SIZE = Scalar(
    "page_size",
    int,
    1,
    "elements of a row for each entry of the page table, a power of 2; the result is `table[start "
    "+ index // page_size] * page_size + index % page_size`",
    low=1,
    high=2**30,
    since=_PAGED,
)
_RAW = Tensor(
    "maybe_output_raw_indices",
    "n top_k",
    doc="receives the indices in the rows",
    writes=True,
    reads=False,
    optional=True,
    since=_PAGED,
    **_INDEX,
)
# From here on, a tie break alone does not fix the order (with page tables neither).
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
        Tensor("output_page_table", "n top_k", doc="entries of the page table", writes=True,
               reads=False, **_INDEX),
        Tensor("src_page_table", "b m", doc="page tables, at least as long as the rows",
               no_index="returned as they are", **_INDEX),
        Tensor("maybe_row_to_batch", "n", "int32", "page table of each row; default: its own",
               index=(f"0 <= maybe_row_to_batch < b {_USED}",), **_MAYBE),
        _LENGTHS, _STATES, _TOP_K,
        _DETERMINISTIC, _TIE_BREAK, _PAGE_SIZE, _GRAPH_SAFE, replace(_STARTS, until=_PAGED),
        _STARTS_OF_BOTH, _PAGE_STARTS, _PAGED_STARTS, _RAW,
        requires=("n == 0 or b >= 1", *_LONG_TABLES, _TABLE_FOR_EACH, _IN_ORDER),
        later={_PAGED: {"variant": "_with_page_size"}},
        nothing_axis="n",
    ),
    *_forms(
        "radix_topk_ragged_transform",
        "Choose the `top_k` greatest of each row's first `lengths` elements, and return their "
        "indices plus the row's offset. A row with no more than `top_k` elements gives all of "
        "them, in order, then -1.",
        _INPUT,
        _INDICES,
        Tensor("offsets", "n", doc="added to each row's indices", no_index="only added", **_INDEX),
        _LENGTHS, _STATES, _TOP_K, _DETERMINISTIC, _TIE_BREAK, _GRAPH_SAFE, _STARTS,
        later=_IN_ANY_ORDER,
    ),
)  # fmt: skip
