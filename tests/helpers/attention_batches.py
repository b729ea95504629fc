"""Batches for the attention entries, and calls of their references by argument name."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi import reference
from fi_ffi.abi.interop import as_desc
from fi_ffi.ops.call.row import KvLayout, Row, Scalar
from fi_ffi.reference.attention.formula import Exact, exact_batch, from_pages

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 5
SCALE = DIM**-0.5
# A batch with requests of no keys, of no queries, and of one.
QO_LENS, KV_LENS = [3, 2, 0, 1, 7], [11, 0, 4, 1, 30]


def call(row: Row, compiled: tuple[tuple[str, object], ...] = (), **given: Any) -> Any:
    """The row's reference with arguments by name; what is left out is neutral."""
    values = []
    for arg in row.args:
        default: Any = None
        if isinstance(arg, Scalar):
            default = {"window_left": -1, "scale_q_scalar": 1.0, "scale_k_scalar": 1.0,
                       "scale_v_scalar": 1.0}.get(arg.name, arg.type(0))  # fmt: skip
        elif isinstance(arg, KvLayout):
            default = 0
        value = given.pop(arg.name, default)
        values.append(as_desc(value) if isinstance(value, np.ndarray) else value)
    assert not given, f"{row.name} has no {list(given)}"
    return reference.entry(row.module, row.signature, row.reference, compiled, row=row)(*values)


def starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float16)


def poisoned(shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def workspaces() -> dict[str, np.ndarray]:
    """Room for a plan, of bytes that are no plan."""
    names = ("float_workspace_buffer", "int_workspace_buffer", "page_locked_int_workspace_buffer")
    return {name: np.full(1024, 0xFF, np.uint8) for name in names}


class Batch:
    """Queries, a paged cache and the same keys side by side, planned."""

    def __init__(
        self, rng: np.random.Generator, qo_lens: list[int] = QO_LENS, kv_lens: list[int] = KV_LENS
    ) -> None:  # fmt: skip
        self.qo_indptr, self.kv_indptr = starts(qo_lens), starts(kv_lens)
        self.kv_lens = np.array(kv_lens, np.int32)
        pages = [-(-n // PAGE) for n in kv_lens]
        self.page_indptr = starts(pages)
        last = [n and (n - 1) % PAGE + 1 for n in kv_lens]
        self.last = np.array(last, np.int32)
        self.indices = rng.permutation(sum(pages) + 3).astype(np.int32)
        self.q = drawn(rng, (sum(qo_lens), HEADS, DIM))
        shape = (len(self.indices), PAGE, KV_HEADS, DIM)
        self.caches = [drawn(rng, shape) for _ in "kv"]
        self.workspaces = workspaces()
        self.o, self.lse = poisoned(self.q.shape), poisoned(self.q.shape[:2], np.float32)

    def keys(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        where = self.page_indptr, self.indices, self.last, request
        k, v = (from_pages(cache, *where) for cache in self.caches)
        return k, v

    def plan(self, row: Row, paged: bool, **given: Any) -> Any:
        given = {
            "qo_indptr": self.qo_indptr,
            "kv_indptr": self.page_indptr if paged else self.kv_indptr,
            "kv_len_arr": self.kv_lens,
            "total_num_rows": int(self.qo_indptr[-1]),
            "batch_size": len(self.kv_lens),
            "num_qo_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "page_size": PAGE if paged else 1,
        } | given
        return call(row, **self.workspaces, **given)

    def run(self, row: Row, info: Any, compiled: Any = (), **given: Any) -> None:
        """Run over the pages, or over keys and values side by side as the row has it."""
        workspaces = {k: v for k, v in self.workspaces.items() if "page_locked" not in k}
        if "ragged" in row.symbol:
            both = [self.keys(request) for request in range(len(self.kv_lens))]
            k, v = (np.concatenate(parts) for parts in zip(*both, strict=True))
            arrays = {"k": k, "v": v, "kv_indptr": self.kv_indptr}
        else:
            arrays = {"paged_k_cache": self.caches[0], "paged_v_cache": self.caches[1],
                      "paged_kv_indptr": self.page_indptr, "paged_kv_indices": self.indices,
                      "paged_kv_last_page_len": self.last}  # fmt: skip
        if "decode" not in row.module:
            arrays["qo_indptr"] = self.qo_indptr
        given = {"plan_info_vec": info, "q": self.q, "o": self.o, "maybe_lse": self.lse,
                 "kv_layout": 0, **workspaces, **arrays} | given  # fmt: skip
        call(row, compiled, **given)

    def expected(self, options: Any) -> Exact:
        return exact_batch(self.q, self.qo_indptr, self.keys, options)
