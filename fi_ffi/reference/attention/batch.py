"""The entries for a batch of requests.

Causal attention of more queries than keys is by its definition here: the first queries see
no key, and their output is 0.  The kernels show such queries keys that they should not see
(fa2, where `kv_len + first query - qo_len` goes below 0 in uint32) or give them the mean of
the values (fa3, where all logits of a tile are the same).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from fi_ffi.abi.objects import Array as Object
from fi_ffi.reference.arrays import Array, store
from fi_ffi.reference.attention import caches, masks, plan
from fi_ffi.reference.attention.variant import Call, Compiled, Variant, cuda_cores

_Keys = Callable[[int], tuple[Array, Array]]


def _attend(
    variant: Variant, qo_indptr: Array, q: Array, keys: _Keys, o: Array, lse: Array | None
) -> None:
    """Write every request's rows; those of no request stay as they are."""
    if qo_indptr[-1] > len(q):
        raise ValueError(f"q has {len(q)} rows; what was planned has {qo_indptr[-1]}")
    for request, (start, stop) in enumerate(itertools.pairwise(qo_indptr)):
        out, sums = variant(request, q[start:stop], *keys(request))
        store(o[start:stop], out)
        if lse is not None:
            store(lse[start:stop], sums)


def _check_window(planned: plan.Lengths, window_left: int) -> None:
    if planned.window_left != window_left:
        raise ValueError(f"window_left is {window_left}; planned for {planned.window_left}")


def ragged_run(
    kind: int, parse: Callable[..., Variant], float_workspace: Array, int_workspace: Array,
    plan_info: Object, q: Array, k: Array, v: Array, qo_indptr: Array, kv_indptr: Array, o: Array,
    lse: Array | None, mask_mode: int, layout: int, window_left: int, enable_pdl: bool, *more: Any,
    compiled: Compiled,
) -> None:  # fmt: skip
    """`ragged_run`: keys and values side by side."""
    planned = plan.load(kind, int_workspace, plan_info)
    k, v = caches.tokens_first(k, layout), caches.tokens_first(v, layout)
    kv_len = planned.kv_len
    if kind == plan.FA2:
        _check_window(planned, window_left)
        planned.must_have("qo_indptr", planned.qo_indptr, qo_indptr)
        planned.must_have("kv_indptr", planned.kv_indptr, kv_indptr)
        kv_len = np.diff(planned.kv_indptr)
    stops = planned.kv_indptr[:-1] + kv_len
    if stops.max(initial=0) > len(k):
        raise ValueError(f"k has {len(k)} rows; what was planned has {stops.max()}")

    def keys(request: int) -> tuple[Array, Array]:
        rows = slice(planned.kv_indptr[request], stops[request])
        return k[rows], v[rows]

    variant = parse(Call(compiled, mask_mode, window_left, q.shape[1], k.shape[1]), *more)
    _attend(variant, planned.qo_indptr, q, keys, o, lse)


def _paged(
    planned: plan.Lengths, kv_len: Array, k_cache: Array, v_cache: Array, indices: Array
) -> _Keys:
    def keys(request: int) -> tuple[Array, Array]:
        where = indices, int(planned.kv_indptr[request]), int(kv_len[request])
        return caches.gathered(k_cache, *where), caches.gathered(v_cache, *where)

    return keys


def paged_run(
    kind: int, parse: Callable[..., Variant], float_workspace: Array, int_workspace: Array,
    plan_info: Object, q: Array, k_cache: Array, v_cache: Array, qo_indptr: Array,
    kv_indptr: Array, indices: Array, last_page_len: Array, o: Array, lse: Array | None,
    mask_mode: int, layout: int, window_left: int, enable_pdl: bool, *more: Any,
    compiled: Compiled,
) -> None:  # fmt: skip
    """`paged_run`: keys and values in the pages of a cache."""
    planned = plan.load(kind, int_workspace, plan_info)
    k_cache, v_cache = caches.tokens_first(k_cache, layout), caches.tokens_first(v_cache, layout)
    kv_len = planned.kv_len
    if kind == plan.FA2:
        _check_window(planned, window_left)
        planned.must_have("qo_indptr", planned.qo_indptr, qo_indptr)
        planned.must_have("paged_kv_indptr", planned.kv_indptr, kv_indptr)
        kv_len = caches.lengths(planned.kv_indptr, last_page_len, k_cache.shape[1])
    call = Call(compiled, mask_mode, window_left, q.shape[1], k_cache.shape[2], paged=True)
    keys = _paged(planned, kv_len, k_cache, v_cache, indices)
    _attend(parse(call, *more), planned.qo_indptr, q, keys, o, lse)


def decode_run(
    float_workspace: Array, int_workspace: Array, plan_info: Object, q: Array, k_cache: Array,
    v_cache: Array, kv_indptr: Array, indices: Array, last_page_len: Array, o: Array,
    lse: Array | None, layout: int, window_left: int, enable_pdl: bool, *more: Any,
    compiled: Compiled,
) -> None:  # fmt: skip
    """batch_decode's `run`: one query a request, which is its last token."""
    planned = plan.load(plan.DECODE, int_workspace, plan_info)
    planned.must_have("paged_kv_indptr", planned.kv_indptr, kv_indptr)
    k_cache, v_cache = caches.tokens_first(k_cache, layout), caches.tokens_first(v_cache, layout)
    kv_len = caches.lengths(planned.kv_indptr, last_page_len, k_cache.shape[1])
    call = Call(compiled, masks.NONE, window_left, q.shape[1], k_cache.shape[2])
    keys = _paged(planned, kv_len, k_cache, v_cache, indices)
    _attend(cuda_cores(call, *more), planned.qo_indptr, q, keys, o, lse)
