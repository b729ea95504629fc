"""Parses an entry's arguments into the options of each request's attention.

There is a function for each list of arguments that `flashinfer/jit/attention/modules.py` appends to
the entries' own. What a module was compiled for is no argument of its entries, but decides which
arguments they read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention import masks
from fi_ffi.reference.attention.formula import Options, exact

_PLAIN, _ROPE_LLAMA, _ALIBI = range(3)
# The kernels' minus infinity before release 0.7.0. The logarithm of a row that sees no key is this,
# plus up to log2 of the number of keys that were hidden from it.
_FINITE, _INFINITE = -5e4, -np.inf

MaskOf = Callable[[int, int, int], Array]


@dataclass(frozen=True)
class Compiled:
    """The parameters that a module was compiled for, by the words of its name.

    With `has_infinity` its sources have IEEE's infinity, as from release 0.7.0 on.
    """

    pos_encoding_mode: int = _PLAIN
    use_sliding_window: bool = False
    use_logits_soft_cap: bool = False
    has_infinity: bool = False

    @property
    def no_key(self) -> float:
        """The logarithm of a row that sees no key."""
        return _INFINITE if self.has_infinity else _FINITE


class Call(NamedTuple):
    """The arguments that all runs have."""

    compiled: Compiled
    mask_mode: int
    window_left: int
    num_qo_heads: int
    num_kv_heads: int
    # Whether keys are in pages, which multi-item scoring requires.
    paged: bool = False

    @property
    def causal(self) -> bool:
        return self.mask_mode == masks.CAUSAL

    def only(self, *mask_modes: int) -> None:
        if self.mask_mode not in mask_modes:
            known = 0 <= self.mask_mode < len(masks.NAMES)
            name = f" ({masks.NAMES[self.mask_mode]})" if known else ""
            raise ValueError(f"mask_mode_code {self.mask_mode}{name} is not one this entry has")

    def each(self, scales: Array | None, scalar: float) -> Array:
        """Return the scales of keys or values, for each query head."""
        if scales is None:
            return np.full(self.num_qo_heads, scalar, np.float32)
        return np.repeat(scales, self.num_qo_heads // self.num_kv_heads)


@dataclass(frozen=True)
class Variant:
    """Attention with all its options set.

    The kernels differ from this definition, and results are judged accordingly. Prefill rounds the
    probabilities to the queries' dtype before it multiplies by the values (with fp8 queries, to
    that fp8 dtype), and rounds heads that RoPE has turned to their own dtype. tanh, exp2 and sines
    are approximations with errors of about 2^-11 and 2^-22. Before 0.7.0, 5e4 stands for infinity;
    in prefill it applies to logits before `sm_scale`, so a hidden key counts for
    `exp(-5e4 * sm_scale - largest logit)`. From an `sm_scale` of 0.003 on that is 0. But
    `sm_scale` includes the scales of fp8 queries and keys: if these fill float8_e4m3fn, it is about
    1e-5, and fa3 sees hidden keys (FlashInfer's pull request 4401, after 0.6.18).
    """

    options: Options
    no_key: float
    mask_of: MaskOf | None = None
    # fa3 ignores the sink of a request without keys.
    sink_needs_keys: bool = False

    def __call__(self, request: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Compute the output and logarithms of one request."""
        qo_len, kv_len = len(q), len(k)
        if self.options.rope is not None and 0 < kv_len < qo_len:
            # The kernels compute positions in uint32, which would wrap around to about 2^32.
            raise ValueError(f"RoPE of {qo_len} queries, and {kv_len} keys: not fewer")
        options = self.options
        if self.mask_of:
            options = replace(options, mask=self.mask_of(request, qo_len, kv_len))
        if self.sink_needs_keys and not kv_len:
            options = replace(options, sink=None)
        found = exact(q, k, v, options)
        return found.out, np.where(found.lse2 == -np.inf, self.no_key, found.lse2)


def cuda_cores(
    call: Call,
    slopes: Array | None,
    logits_soft_cap: float,
    sm_scale: float,
    rope_rcp_scale: float,
    rope_rcp_theta: float,
) -> Variant:
    """Parse the arguments of decode, which begin those of fa2."""
    compiled = call.compiled
    if compiled.pos_encoding_mode == _ALIBI and slopes is None:
        raise ValueError("a module compiled for ALiBi needs maybe_alibi_slopes")
    rope = None
    if compiled.pos_encoding_mode == _ROPE_LLAMA:
        rope = np.float64(1) / rope_rcp_scale, np.float64(1) / rope_rcp_theta
    return Variant(
        Options(
            sm_scale,
            call.causal,
            call.window_left if compiled.use_sliding_window else -1,
            logits_soft_cap if compiled.use_logits_soft_cap else 0.0,
            alibi_slopes=slopes if compiled.pos_encoding_mode == _ALIBI else None,
            rope=rope,
        ),
        compiled.no_key,
    )


def fa2(
    call: Call,
    mask: Array | None,
    mask_indptr: Array | None,
    slopes: Array | None,
    prefix_len: Array | None,
    token_positions: Array | None,
    max_item_len: Array | None,
    *more: Any,
) -> Variant:
    """Parse the arguments of batch prefill with fa2; `more` is two block scales, which releases
    before 0.6.10 lack, and five numbers."""
    logits_soft_cap, sm_scale, rope_rcp_scale, rope_rcp_theta, token_positions_len = more[-5:]
    call.only(masks.NONE, masks.CAUSAL, masks.CUSTOM, *([masks.MULTI_ITEM] if call.paged else ()))
    if call.window_left >= 0 and not call.compiled.use_sliding_window:
        # The kernels would skip the tiles outside the window, but show the others whole.
        raise ValueError(f"window_left {call.window_left} of a module without sliding windows")
    mask_of = _multi_item(call, prefix_len, token_positions, max_item_len, token_positions_len)
    if call.mask_mode == masks.CUSTOM:
        mask_of = _custom(mask, mask_indptr)
    common = cuda_cores(call, slopes, logits_soft_cap, sm_scale, rope_rcp_scale, rope_rcp_theta)
    return replace(common, mask_of=mask_of)


def fa2_single(call: Call, mask: Array | None, slopes: Array | None, *more: float) -> Variant:
    """Parse the arguments of single prefill with fa2; `more` is two block scales and four
    numbers."""
    # This kernel skips no tiles, so without sliding windows it has no window at all.
    call = call if call.compiled.use_sliding_window else call._replace(window_left=-1)
    start = np.zeros(1, np.int32)
    return fa2(call, mask, start, slopes, None, None, None, *more, 0)


def fa3(
    call: Call,
    prefix_len: Array | None,
    token_positions: Array | None,
    max_item_len: Array | None,
    v_scales: Array | None,
    logits_soft_cap: float,
    sm_scale: float,
    v_scale: float,
    token_positions_len: int,
) -> Variant:
    """Parse the arguments of batch prefill with fa3."""
    call.only(masks.NONE, masks.CAUSAL, *([masks.MULTI_ITEM] if call.paged else ()))
    mask_of = _multi_item(call, prefix_len, token_positions, max_item_len, token_positions_len)
    options = Options(
        sm_scale,
        call.causal,
        _hopper_window(call),
        logits_soft_cap if call.compiled.use_logits_soft_cap else 0.0,
        v_scale=call.each(v_scales, v_scale),
    )
    return Variant(options, call.compiled.no_key, mask_of)


def fa3_single(
    call: Call, v_scales: Array | None, logits_soft_cap: float, sm_scale: float, v_scale: float
) -> Variant:
    """Parse the arguments of single prefill with fa3."""
    return fa3(call, None, None, None, v_scales, logits_soft_cap, sm_scale, v_scale, 0)


def fa3_fp8(
    call: Call,
    q_scales: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    sm_scale: float,
    q_scale: float,
    k_scale: float,
    v_scale: float,
) -> Variant:
    """Parse the arguments of prefill with fa3 and fp8 queries, keys and values, single and
    batch."""
    call.only(masks.NONE, masks.CAUSAL)
    of_q = np.full(call.num_qo_heads, q_scale, np.float32) if q_scales is None else q_scales
    scale = of_q * call.each(k_scales, k_scale) * np.float32(sm_scale)
    options = Options(
        scale, call.causal, _hopper_window(call), v_scale=call.each(v_scales, v_scale)
    )
    return Variant(options, call.compiled.no_key)


def sink_fa2(call: Call, sink: Array, sm_scale: float) -> Variant:
    """Parse the arguments of fa2 with attention sinks, which always has the window."""
    call.only(masks.NONE, masks.CAUSAL)
    options = Options(sm_scale, call.causal, call.window_left, sink=sink)
    return Variant(options, call.compiled.no_key)


def sink_fa3(call: Call, sink: Array, sm_scale: float) -> Variant:
    """Parse the arguments of fa3 with attention sinks."""
    call.only(masks.NONE, masks.CAUSAL)
    options = Options(sm_scale, call.causal, _hopper_window(call), sink=sink)
    return Variant(options, call.compiled.no_key, sink_needs_keys=True)


def _hopper_window(call: Call) -> int:
    if not call.compiled.use_sliding_window:
        return -1
    if call.window_left < 0:
        # -1 would hide a query's own key and all before it.
        raise ValueError(f"window_left {call.window_left} of an fa3 module with sliding windows")
    return call.window_left


def _custom(mask: Array | None, mask_indptr: Array | None) -> MaskOf:
    if mask is None or mask_indptr is None:
        raise ValueError("mask_mode_code 2 (custom) needs maybe_custom_mask, and its indptr")
    return lambda request, qo_len, kv_len: masks.custom(
        mask, int(mask_indptr[request]), qo_len, kv_len
    )


def _multi_item(
    call: Call,
    prefix_len: Array | None,
    token_positions: Array | None,
    max_item_len: Array | None,
    length: int,
) -> MaskOf | None:
    if call.mask_mode != masks.MULTI_ITEM:
        return None
    if prefix_len is None or token_positions is None or max_item_len is None:
        raise ValueError(
            "mask_mode_code 3 (multi-item scoring) needs maybe_prefix_len_ptr, "
            "maybe_token_pos_in_items_ptr and maybe_max_item_len_ptr"
        )
    return lambda request, qo_len, kv_len: masks.multi_item(
        qo_len,
        kv_len,
        int(prefix_len[request]),
        token_positions[request * length : (request + 1) * length],
        int(max_item_len[request]),
    )
