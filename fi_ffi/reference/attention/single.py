"""The entries for one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_ffi.reference.arrays import Array, store
from fi_ffi.reference.attention import masks
from fi_ffi.reference.attention.caches import tokens_first
from fi_ffi.reference.attention.variant import Call, Compiled, Variant, cuda_cores, fa2_single


def _write(o: Array, lse: Array | None, result: tuple[Array, Array]) -> None:
    store(o, result[0])
    if lse is not None:
        store(lse, result[1])


def decode(
    q: Array, k: Array, v: Array, tmp: Array, o: Array, lse: Array | None, layout: int,
    window_left: int, *more: Any, compiled: Compiled,
) -> None:  # fmt: skip
    """single_decode's `run`: one query, which is the request's last token."""
    k, v = tokens_first(k, layout), tokens_first(v, layout)
    variant = cuda_cores(Call(compiled, masks.NONE, window_left, len(q), k.shape[1]), *more)
    out, sums = variant(0, q[None], k, v)
    _write(o, lse, (out[0], sums[0]))


def prefill(
    parse: Callable[..., Variant], q: Array, k: Array, v: Array, tmp: Array, o: Array,
    lse: Array | None, mask_mode: int, layout: int, window_left: int, *more: Any,
    compiled: Compiled,
) -> None:  # fmt: skip
    """single_prefill's `run`."""
    k, v = tokens_first(k, layout), tokens_first(v, layout)
    if parse is fa2_single and mask_mode == masks.CAUSAL and len(k) < len(q):
        raise ValueError(f"causal attention needs kv_len {len(k)} to be qo_len {len(q)} or more")
    variant = parse(Call(compiled, mask_mode, window_left, q.shape[1], k.shape[1]), *more)
    _write(o, lse, variant(0, q, k, v))
