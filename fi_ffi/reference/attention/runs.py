"""The entries that run attention: for one request, for a batch, MLA's, POD's and XQA's.

Causal attention of more queries than keys follows its definition here: the first queries see no
key, and their output is 0. The kernels differ: fa2 shows such queries keys that they should not see
(`kv_len + first query - qo_len` wraps around in uint32), and fa3 gives them the mean of the values
(all logits of a tile are equal).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.objects import Array as Object
from fi_ffi.reference.arrays import Array, store, store_saturated
from fi_ffi.reference.attention import masks, plan
from fi_ffi.reference.attention.formula import Options, exact, gathered, lengths, tokens_first
from fi_ffi.reference.attention.variant import (
    Call,
    Compiled,
    Variant,
    cuda_cores,
    fa2,
    fa2_single,
)

_Keys = Callable[[int], tuple[Array, Array]]


class Writes(list[Callable[[], None]]):
    """What a call writes, once all of it is computed: a call that is refused writes nothing."""


def _write(o: Array, lse: Array | None, where: Any, result: tuple[Array, Array]) -> Writes:
    """Write some rows of the output, and their logarithms if there is an `lse`."""
    writes = Writes([partial(store_saturated, o[where], result[0])])
    if lse is not None:
        writes.append(partial(store, lse[where], result[1]))
    return writes


def single_decode(
    q: Array,
    k: Array,
    v: Array,
    tmp: Array,
    o: Array,
    lse: Array | None,
    layout: int,
    window_left: int,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """single_decode's `run`: one query, the request's last token."""
    k, v = tokens_first(k, layout), tokens_first(v, layout)
    variant = cuda_cores(Call(compiled, masks.NONE, window_left, len(q), k.shape[1]), *more)
    out, sums = variant(0, q[None], k, v)
    return _write(o, lse, ..., (out[0], sums[0]))


def single_prefill(
    parse: Callable[..., Variant],
    q: Array,
    k: Array,
    v: Array,
    tmp: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """single_prefill's `run`."""
    k, v = tokens_first(k, layout), tokens_first(v, layout)
    if parse is fa2_single and mask_mode == masks.CAUSAL and len(k) < len(q):
        raise ValueError(f"causal attention needs kv_len {len(k)} to be qo_len {len(q)} or more")
    variant = parse(Call(compiled, mask_mode, window_left, q.shape[1], k.shape[1]), *more)
    return _write(o, lse, ..., variant(0, q, k, v))


def _attend(
    variant: Variant, qo_indptr: Array, q: Array, keys: _Keys, o: Array, lse: Array | None
) -> Writes:
    """Write every request's rows; rows of no request stay unchanged."""
    writes = Writes()
    if qo_indptr[-1] > len(q):
        raise ValueError(f"q has {len(q)} rows; what was planned has {qo_indptr[-1]}")
    for request, (start, stop) in enumerate(itertools.pairwise(qo_indptr)):
        rows = slice(start, stop)
        writes += _write(o, lse, rows, variant(request, q[rows], *keys(request)))
    return writes


def _check_window(planned: plan.Lengths, window_left: int) -> None:
    if planned.window_left != window_left:
        raise ValueError(f"window_left is {window_left}; planned for {planned.window_left}")


def ragged_run(
    kind: int,
    parse: Callable[..., Variant],
    float_workspace: Array,
    int_workspace: Array,
    plan_info: Object,
    q: Array,
    k: Array,
    v: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    enable_pdl: bool,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """`ragged_run`: keys and values without pages."""
    planned = plan.load(kind, int_workspace, plan_info)
    k, v = tokens_first(k, layout), tokens_first(v, layout)
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
    return _attend(variant, planned.qo_indptr, q, keys, o, lse)


def _paged(
    planned: plan.Lengths, kv_len: Array, k_cache: Array, v_cache: Array, indices: Array
) -> _Keys:
    def keys(request: int) -> tuple[Array, Array]:
        where = indices, int(planned.kv_indptr[request]), int(kv_len[request])
        return gathered(k_cache, *where), gathered(v_cache, *where)

    return keys


def paged_run(
    kind: int,
    parse: Callable[..., Variant],
    float_workspace: Array,
    int_workspace: Array,
    plan_info: Object,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    indices: Array,
    last_page_len: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    window_left: int,
    enable_pdl: bool,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """`paged_run`: keys and values in the pages of a cache."""
    planned = plan.load(kind, int_workspace, plan_info)
    k_cache, v_cache = tokens_first(k_cache, layout), tokens_first(v_cache, layout)
    kv_len = planned.kv_len
    if kind == plan.FA2:
        _check_window(planned, window_left)
        planned.must_have("qo_indptr", planned.qo_indptr, qo_indptr)
        planned.must_have("paged_kv_indptr", planned.kv_indptr, kv_indptr)
        kv_len = lengths(planned.kv_indptr, last_page_len, k_cache.shape[1])
    call = Call(compiled, mask_mode, window_left, q.shape[1], k_cache.shape[2], paged=True)
    keys = _paged(planned, kv_len, k_cache, v_cache, indices)
    return _attend(parse(call, *more), planned.qo_indptr, q, keys, o, lse)


def attention_run(
    float_workspace: Array,
    int_workspace: Array,
    plan_info: Object,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    indices: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    layout: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    v_scale: float,
    sm_scale: float,
    soft_cap: float,
    k_sf: Array | None,
    v_sf: Array | None,
    *,
    compiled: Compiled,
) -> Writes:
    """batch_attention's `run`."""
    if k_sf is not None or v_sf is not None:
        raise ValueError("keys of 4 bits need a GPU")
    planned = plan.load(plan.ATTENTION, int_workspace, plan_info)
    k_cache, v_cache = tokens_first(k_cache, layout), tokens_first(v_cache, layout)
    call = Call(compiled, mask_mode, -1, num_qo_heads, num_kv_heads, paged=True)
    call.only(masks.NONE, masks.CAUSAL)
    if planned.causal != call.causal:
        raise ValueError("planned with another mask: plan again")
    if page_size != k_cache.shape[1]:
        raise ValueError(f"page_size is {page_size}; k_cache has pages of {k_cache.shape[1]}")
    soft_cap = soft_cap if compiled.use_logits_soft_cap else 0.0
    options = Options(sm_scale, call.causal, logits_soft_cap=soft_cap, v_scale=v_scale)
    keys = _paged(planned, planned.kv_len, k_cache, v_cache, indices)
    return _attend(Variant(options, compiled.no_key), planned.qo_indptr, q, keys, o, lse)


def batch_decode(
    float_workspace: Array,
    int_workspace: Array,
    plan_info: Object,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    kv_indptr: Array,
    indices: Array,
    last_page_len: Array,
    o: Array,
    lse: Array | None,
    layout: int,
    window_left: int,
    enable_pdl: bool,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """batch_decode's `run`: one query per request, its last token."""
    planned = plan.load(plan.DECODE, int_workspace, plan_info)
    if planned.is_of_any_lengths:
        planned = planned._replace(kv_indptr=kv_indptr[: planned.batch_size + 1])
    else:
        planned.must_have("paged_kv_indptr", planned.kv_indptr, kv_indptr)
    k_cache, v_cache = tokens_first(k_cache, layout), tokens_first(v_cache, layout)
    kv_len = lengths(planned.kv_indptr, last_page_len, k_cache.shape[1])
    call = Call(compiled, masks.NONE, window_left, q.shape[1], k_cache.shape[2])
    keys = _paged(planned, kv_len, k_cache, v_cache, indices)
    return _attend(cuda_cores(call, *more), planned.qo_indptr, q, keys, o, lse)


def mla_run(
    float_workspace: Array,
    int_workspace: Array,
    plan_info: Object,
    q_nope: Array,
    q_pe: Array,
    ckv_cache: Array,
    kpe_cache: Array,
    indices: Array,
    o: Array,
    lse: Array | None,
    mask_mode: int,
    num_heads: int,
    page_size: int,
    sm_scale: float,
    return_lse_base_on_e: bool,
    *no_scales: None,
    compiled: Compiled,
) -> Writes:
    """batch_mla's `run`. From 0.6.14 on it has arguments for the scales of an fp8 cache.

    A row that sees no key has a logarithm of minus infinity, unlike in other entries. The kernel
    writes -5e4 if it has split the request.
    """
    call = Call(compiled, mask_mode, -1, num_heads, 1)
    call.only(masks.NONE, masks.CAUSAL)
    if page_size != ckv_cache.shape[1]:
        raise ValueError(f"page_size is {page_size}; ckv_cache has pages of {ckv_cache.shape[1]}")
    planned = plan.load(plan.MLA, int_workspace, plan_info)
    if planned.causal and not call.causal:
        raise ValueError("planned for causal attention, which leaves out keys: plan again without")
    if planned.qo_indptr[-1] > len(q_nope):
        raise ValueError(f"q_nope has {len(q_nope)} rows; planned for {planned.qo_indptr[-1]}")
    writes = Writes()
    for request, length in enumerate(planned.kv_len):
        rows = slice(planned.qo_indptr[request], planned.qo_indptr[request + 1])
        where = indices, int(planned.kv_indptr[request]), int(length)
        ckv, kpe = (gathered(cache, *where) for cache in (ckv_cache, kpe_cache))
        q = np.concatenate((q_nope[rows], q_pe[rows]), axis=-1)
        k = np.concatenate((ckv, kpe), axis=-1)
        found = exact(q, k[:, None], ckv[:, None], Options(sm_scale, call.causal))
        base = np.log(2) if return_lse_base_on_e else 1.0
        writes += _write(o, lse, rows, (found.out, found.lse2 * base))
    return writes


def mla_run_fp8(*values: Any, compiled: Compiled) -> Writes:
    """batch_mla's `run` with an fp8 cache, which is scaled and rounded to bfloat16 first."""
    *given, ckv_scale, kpe_scale = values[:17]
    groups = values[17] if len(values) > 17 else None
    ckv_at, kpe_at = 5, 6
    given[kpe_at] = scaled(given[kpe_at], kpe_scale)
    if groups is None:
        given[ckv_at] = scaled(given[ckv_at], ckv_scale)
    else:
        wide = given[ckv_at].astype(np.float32) * np.repeat(groups, 128, axis=-1)
        given[ckv_at] = wide.astype(ml_dtypes.bfloat16)
    return mla_run(*given, compiled=compiled)


def scaled(cache: Array, scale: float) -> Array:
    """Return an fp8 cache times a scale rounded to bfloat16, in bfloat16."""
    of_16 = np.float32(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    found: Array = (cache.astype(np.float32) * of_16).astype(ml_dtypes.bfloat16)
    return found


_OF_PREFILL = 15  # number of arguments of POD's prefill


def pod_with_kv_cache_tensor(*values: Any, compiled: Compiled) -> Writes:
    """POD attention. The windows are those of the arguments, as in the module compiled for them."""
    prefill = _pod_prefill(*values[:_OF_PREFILL], compiled=compiled)
    return Writes(prefill + _pod_decode(*values[_OF_PREFILL:], compiled=compiled))


def _pod_prefill(*args: Any, compiled: Compiled) -> Writes:
    """The prefill's half: single_prefill's arguments, without the scales of blocks."""
    compiled = replace(compiled, use_sliding_window=args[8] >= 0)  # window_left
    before, numbers = args[:11], args[11:]
    return single_prefill(fa2_single, *before, None, None, *numbers, compiled=compiled)


def _pod_decode(*args: Any, compiled: Compiled) -> Writes:
    """A half over pages: paged_run's arguments, with `enable_pdl` last and without multi-item
    scoring and the scales of blocks."""
    compiled = replace(compiled, use_sliding_window=args[14] >= 0)  # window_left
    masks, numbers, enable_pdl = args[15:18], args[18:22], args[22]
    more = *masks, None, None, None, None, None, *numbers, 0
    return paged_run(plan.FA2, fa2, *args[:15], enable_pdl, *more, compiled=compiled)


_OF_BATCH = 22  # number of arguments of each half of batched POD attention


def batch_pod_with_kv_cache_tensor(*values: Any, compiled: Compiled) -> Writes:
    """Batched POD attention. Both halves are paged prefills; the last arguments are a flag and
    counters."""
    *halves, enable_pdl, _ = values
    writes = Writes()
    for start in (0, _OF_BATCH):
        half: tuple[Any, ...] = (*halves[start : start + _OF_BATCH], enable_pdl)
        writes += _pod_decode(*half, compiled=compiled)
    return writes


def _scale(scale: float, tensor: Array | None) -> float:
    return scale if tensor is None else float(tensor[0])


def _of_drafts(words: Array, length: int) -> Array:
    """Return the mask of several queries, whose own keys are the request's last."""
    count = len(words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=count, bitorder="little")
    return np.hstack((np.ones((count, length - count), bool), bits.astype(bool)))


def xqa_wrapper(
    run_sm90_fp8_mha: bool,
    sm_count: int,
    num_kv_heads: int,
    window: int,
    q_scale: float,
    q_scale_tensor: Array | None,
    output: Array,
    rcp_out_scale: float,
    q: Array,
    sinks: Array | None,
    k_cache: Array,
    v_cache: Array,
    *more: Any,
    compiled: Compiled,
) -> Writes:
    """XQA. Only fp8 keys are scaled; the kernel ignores a scale of others.

    From 0.6.7 on `more` begins with the two scales of keys of 4 bits; from 0.6.16 on it has the
    starts of queries before the mask.
    """
    *more, mask, semaphores, _, _ = more  # type: ignore[assignment]
    sizes, rest = (more[:7], more[7:]) if len(more) == 7 else (more[2:9], more[:2] + more[9:])
    page_table, _, seq_lens, batch_size, kv_scale, kv_scale_tensor, q_seq_len = sizes
    if any(value is not None for value in rest):
        raise ValueError("keys of 4 bits, and numbers of queries that differ, need a GPU")
    if (q_seq_len > 1) != (mask is not None):
        raise ValueError("a mask with several queries of each request, and no mask with one")
    if semaphores.any():
        raise ValueError("the semaphores are not zero")
    of_kv = _scale(kv_scale, kv_scale_tensor) if k_cache.itemsize == 1 else 1.0
    sm_scale = _scale(q_scale, q_scale_tensor) * of_kv / q.shape[-1] ** 0.5
    flat = None if sinks is None else sinks.reshape(-1)
    q, output = (x.reshape(batch_size, q_seq_len, *x.shape[-2:]) for x in (q, output))
    writes = Writes()
    for request in range(batch_size):
        length = int(seq_lens[request, 0])
        seen = None if mask is None else _of_drafts(mask[request], length)
        where = page_table[request], 0, length
        keys, values = gathered(k_cache, *where), gathered(v_cache, *where)
        scale = of_kv * (rcp_out_scale if output.itemsize == 1 else 1.0)
        left = window - 1 if compiled.use_sliding_window else -1
        options = Options(sm_scale, window_left=left, sink=flat, v_scale=scale, mask=seen)
        found = exact(q[request], keys, values, options)
        writes.append(partial(store_saturated, output[request], found.out))
    return writes


def xqa_wrapper_mla(
    sm_count: int,
    q_scale: float,
    q_scale_tensor: Array | None,
    output: Array,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    page_table: Array,
    max_seq_len: int,
    seq_lens: Array,
    batch_size: int,
    kv_scale: float,
    kv_scale_tensor: Array | None,
    semaphores: Array,
    scratch: Array,
    enable_pdl: bool,
    *,
    compiled: Compiled,
) -> Writes:
    """XQA over a latent cache. The values are the first elements of their cache; 16-bit keys are
    scaled as well."""
    if semaphores.any():
        raise ValueError("the semaphores are not zero")
    of_kv = _scale(kv_scale, kv_scale_tensor)
    options = Options(_scale(q_scale, q_scale_tensor) * of_kv, v_scale=of_kv)
    k_cache, v_cache = k_cache.swapaxes(1, 2), v_cache[..., : output.shape[-1]].swapaxes(1, 2)
    writes = Writes()
    for request in range(batch_size):
        length = int(seq_lens[request, 0])
        where = page_table[request], 0, length
        keys, values = gathered(k_cache, *where), gathered(v_cache, *where)
        found = exact(q[request], keys, values, options)
        writes.append(partial(store, output[request], found.out))
    return writes
