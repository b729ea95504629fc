"""What attention refuses: smallest cases that come out wrong, by entries that check nothing."""

from __future__ import annotations

import numpy as np

from fi_ffi.module_names import uri
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.reference.attention.formula import Options, exact

from tests.helpers.untyped_calls import call, module, poisoned

DIM = 128
SCALE = DIM**-0.5


def run(to_gpu, stream, q, k, v, *, slopes=None, cap=0.0, **compiled):
    """Single prefill by fa2, of all keys: the output and the logarithms."""
    parameters = {"dtype_q": "f16", "head_dim_qk": DIM} | compiled
    entry = module(uri("single_prefill", release=release_in_force(), **parameters)).run
    o, lse = to_gpu(poisoned(q.shape, np.float16)), to_gpu(poisoned(q.shape[:2], np.float32))
    tmp = to_gpu(np.zeros(1 << 20, np.uint8))
    slopes = None if slopes is None else to_gpu(slopes)
    mask_mode, layout, window_left, rope_rcp_scale, rope_rcp_theta = 0, 0, -1, 1.0, 1e-4
    call(
        entry, *map(to_gpu, (q, k, v)), tmp, o, lse, mask_mode, layout, window_left, None, slopes,
        None, None, cap, SCALE, rope_rcp_scale, rope_rcp_theta, stream=stream,
    )  # fmt: skip
    return o.get(), lse.get()


def test_alibi_with_a_soft_cap_is_scaled_twice(to_gpu, stream):
    """A query and two keys: the second's share of the values is 0.63, and should be 0.996."""
    q, slope, cap = np.full((1, 1, DIM), 0.5, np.float16), np.float32([0.5]), 10.0
    k = np.zeros((2, 1, DIM), np.float16)
    k[1] = 1.0
    v = np.zeros_like(k)
    v[1] = 1.0
    o, _ = run(to_gpu, stream, q, k, v, slopes=slope, cap=cap, pos_encoding_mode=2,
               use_logits_soft_cap=True)  # fmt: skip
    logits = np.array([0.0, 0.5 * DIM * SCALE + 0.5])
    right, twice = (
        1 / (1 + np.exp(-cap * np.diff(np.tanh(of / cap))[0])) for of in (logits, logits * SCALE)
    )
    assert right > 0.99 > 0.7 > twice
    assert np.allclose(o.astype(np.float64), twice, atol=4e-3)


def test_rope_of_more_queries_than_keys_is_of_wrapped_positions(to_gpu, stream):
    """Three queries, two keys: the first query is at -1, and is turned as if at 2**32 - 1."""
    rng = np.random.default_rng(20)
    q = (3 * rng.standard_normal((3, 8, DIM))).astype(np.float16)
    k, v = (rng.standard_normal((2, 8, DIM)).astype(np.float16) for _ in range(2))
    o, lse = run(to_gpu, stream, q, k, v, pos_encoding_mode=1)
    right = exact(q, k, v, Options(SCALE, rope=(1.0, 1e4)))
    error = np.abs(lse - right.lse2).max(axis=1)
    assert error[0] > 0.5
    assert (error[1:] < 0.05).all()
    assert np.allclose(o[1:].astype(np.float64), right.out[1:], atol=0.05)
