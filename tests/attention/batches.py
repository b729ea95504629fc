"""Random arrays, lengths of requests, and where their pages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fi_ffi

from tests.helpers.calls import padded

# Pages of a cache, or ragged keys, that belong to no request.
SPARE = 3


@dataclass(frozen=True)
class Batch:
    """A batch: queries and keys of each request, and the index arrays that say where.

    `kv_indptr` counts pages where there are `indices`, and ragged keys otherwise.
    """

    qo: list[int]
    kv: list[int]
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    indices: np.ndarray | None = None
    last_page_len: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return int(self.qo_indptr[-1])


def ints(values: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.array(values, np.int32)


def indptr(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return ints([0, *np.cumsum(counts)])


def ragged(qo: list[int], kv: list[int]) -> Batch:
    return Batch(qo, kv, indptr(qo), indptr(kv))


def paged(
    qo: list[int], kv: list[int], page_size: int, num_pages: int, rng: np.random.Generator
) -> Batch:
    """Requests with pages in no order, the first `SPARE` of the cache among none of them.

    More than are needed are listed, as may be: no request has those.
    """
    counts = [-(-n // page_size) for n in kv]
    order = SPARE + rng.permutation(num_pages - SPARE)
    last = [(n - 1) % page_size + 1 if n else 0 for n in kv]
    listed = min(sum(counts) + 2, len(order))
    return Batch(qo, kv, indptr(qo), indptr(counts), ints(order[:listed]), ints(last))


def draw(
    count: int, most_queries: int, most_keys: int, page_size: int, rng: np.random.Generator, *,
    no_keys: bool = True,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Lengths of all sizes: no request has fewer keys than queries but for those that have none.

    The first requests of several are: the longest; no query; no key; a full last page; a
    last page of one token.
    """
    kv = [int(n) for n in np.exp(rng.uniform(0, np.log(most_keys + 1), count))]
    kv = [min(max(n, 1), most_keys) for n in kv]
    qo = [int(min(n, 1 + rng.integers(0, most_queries))) for n in kv]
    whole = max(most_keys // page_size - 1, 1) * page_size
    special = [(qo[0], most_keys), (0, kv[0]), (qo[0], 0), (1, whole), (1, whole + 1)]
    if not no_keys:
        special.pop(2)
    if count >= len(special):
        qo[: len(special)], kv[: len(special)] = map(list, zip(*special, strict=True))
        qo[0] = min(most_queries, kv[0])
    return qo, kv


def random(rng: np.random.Generator, shape: Sequence[int], dtype: str, pad: int = 0) -> Any:
    """Normal numbers, with `pad` elements of poison between rows of the last axis."""
    numbers = rng.standard_normal(shape, np.float32).astype(fi_ffi.DTYPES[dtype].numpy)
    return padded(numbers, pad) if pad else numbers


def first(desc: fi_ffi.TensorDesc, rows: int) -> fi_ffi.TensorDesc:
    """The first rows of a tensor."""
    shape = (rows, *desc.shape[1:])
    return fi_ffi.TensorDesc(desc.ptr, shape, desc.dtype, strides=desc.strides, device=desc.device)


def bytes_of(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()
