"""Modules of CuTe DSL, called as any other: those of FlashInfer 0.7.2.post1.

`fi-ffi build --release 0.7.2.post1 gdn_decode kda_decode rmsnorm_cute` makes them.
"""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers.untyped_calls import (
    BF16,
    HALF,
    SUM,
    call,
    float64,
    judged,
    module,
    poisoned,
    worst,
)

_HEADS = "1_16_32_128_128"
GDN = (
    f"gdn_decode_pretranspose_sm90a_cute_dsl_decode_sm_90a_{_HEADS}_"
    "tfloat32xfloat32xbfloat16xfloat32xbfloat16xbfloat16_0_08838834764831845_1_1_16384_128_1"
)
KDA = "recurrent_kda_sm90a_cute_dsl_recurrent_kda_launch_b64_t1_h16_d128_gate"
RMSNORM = "rmsnorm_sm90a_cute_dsl_rmsnorm_kernel_bfloat16_4096_bias0"
_SCALE = 128**-0.5


def only(name):
    """The one function of a module, or the test is skipped."""
    found = module(name)
    (symbol,) = found.entries()
    return found.entry(symbol)


def normalised(x):
    return float64(x) / np.sqrt((float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)


def softplus(x):
    return np.logaddexp(0, float64(x))


def step(states, q, k, v, decay, beta):
    """States [n, h, v, k] after a token, what it reads of them, and the sizes of both."""
    faded = decay * states
    new = beta[..., None] * (v - np.einsum("nhvk,nhk->nhv", faded, k))
    after = faded + new[..., None] * k[:, :, None, :]
    size = np.abs(faded) + np.abs(new)[..., None] * np.abs(k)[:, :, None, :]
    size += np.einsum("nhvk,nhk->nhv", np.abs(faded), np.abs(k))[..., None] * np.abs(k)[:, :, None]
    read = np.einsum("nhvk,nhk->nhv", after, q)
    return after, read, size, np.einsum("nhvk,nhk->nhv", size, np.abs(q))


@pytest.mark.parametrize("batch", [1, 64, 130])
def test_gdn_decode(batch, rng, to_gpu, stream):
    entry = only(GDN)
    slots, heads, q_heads = batch + 3, 32, 16
    pool = rng.standard_normal((slots, heads, 128, 128)).astype(np.float32) / 8
    q, k = (rng.standard_normal((batch, 1, q_heads, 128)).astype(BF16) for _ in "qk")
    v = rng.standard_normal((batch, 1, heads, 128)).astype(BF16)
    a, b = (rng.standard_normal((batch, 1, heads)).astype(BF16) for _ in "ab")
    a_log, dt_bias = (rng.standard_normal(heads).astype(np.float32) for _ in range(2))
    where = rng.permutation(slots)[:batch].astype(np.int32)
    each = np.repeat(normalised(q)[:, 0], 2, axis=1), np.repeat(normalised(k)[:, 0], 2, axis=1)
    decay = np.exp(-np.exp(float64(a_log)) * softplus(float64(a[:, 0]) + dt_bias))
    beta = 1 / (1 + np.exp(-float64(b[:, 0])))
    after, read, size, of_read = step(
        float64(pool[where]), each[0] * _SCALE, each[1], float64(v[:, 0]), decay[..., None, None],
        beta,
    )  # fmt: skip
    states, out = to_gpu(pool), to_gpu(poisoned((batch, 1, heads, 128), BF16))
    given = [to_gpu(x) for x in (a_log, a, dt_bias, q, k, v, b)]
    index, unused = to_gpu(where), to_gpu(np.zeros(batch + 1, np.int32))
    call(entry, states, *given, out, index, index, unused, stream=stream)
    judged(out, read[:, None], HALF[BF16] * np.abs(read[:, None]) + SUM * of_read[:, None])
    expected = float64(pool)
    expected[where] = after
    bound = np.full(expected.shape, 1e-30)
    bound[where] += SUM * size
    assert worst(states.get(), expected, bound) <= 1, "states, and those of nobody as they were"
    assert states.intact()


def test_kda_decode(rng, to_gpu, stream):
    entry = only(KDA)
    batch, heads = 64, 16
    pool = (rng.standard_normal((batch, heads, 128, 128)) / 8).astype(BF16)
    q, k, v, g = (rng.standard_normal((batch, 1, heads, 128)).astype(BF16) for _ in "qkvg")
    beta = rng.uniform(0, 1, (batch, 1, heads)).astype(BF16)
    a_log = rng.standard_normal(heads).astype(np.float32)
    dt_bias = rng.standard_normal(heads * 128).astype(np.float32)
    gate = softplus(float64(g[:, 0]) + dt_bias.reshape(heads, 128))
    decay = np.exp(-np.exp(float64(a_log))[:, None] * gate)[:, :, None, :]
    after, read, size, of_read = step(
        float64(pool), normalised(q)[:, 0] * _SCALE, normalised(k)[:, 0], float64(v[:, 0]), decay,
        float64(beta[:, 0]),
    )  # fmt: skip
    states, out = to_gpu(pool), to_gpu(poisoned((batch, 1, heads, 128), BF16))
    one = to_gpu(np.zeros(1, np.int32))
    given = [to_gpu(x) for x in (q, k, v, g, beta)]
    gates = [to_gpu(a_log), to_gpu(dt_bias)]
    call(entry, *given, states, states, one, out, *gates, one, one, one, _SCALE, 1e-6, 0.0,
         stream=stream)  # fmt: skip
    judged(out, read[:, None], HALF[BF16] * np.abs(read[:, None]) + SUM * of_read[:, None])
    judged(states, after, HALF[BF16] * np.abs(after) + SUM * size)


@pytest.mark.parametrize("rows", [1, 33, 4096])
def test_rmsnorm(rows, rng, to_gpu, stream):
    entry = only(RMSNORM)
    x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((rows, 4096), (4096,)))
    expected = float64(x) * float64(weight)
    expected /= np.sqrt((float64(x) ** 2).mean(1, keepdims=True) + 1e-6)
    out = to_gpu(poisoned((rows, 4096), BF16))
    call(entry, to_gpu(x), to_gpu(weight), out, rows, 1e-6, stream=stream)
    judged(out, expected, (HALF[BF16] + SUM) * np.abs(expected) + 1e-30)


def test_a_wrong_call_is_refused(to_gpu, stream):
    entry = only(RMSNORM)
    x = to_gpu(np.zeros((2, 4096), BF16))
    out, weight = to_gpu(poisoned((2, 4096), BF16)), to_gpu(np.zeros(4095, BF16))
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"Tensor\(\[n0, 4096\], bfloat16\)"):
        call(entry, x, weight, out, 2, stream=stream)
    with pytest.raises(fi_ffi.KernelError, match="Mismatched"):
        call(entry, x, weight, out, 2, 1e-6, stream=stream)
    assert (out.get().view(np.uint16) == 0xFFFF).all()
