"""Mamba's states with drafted tokens, of FlashInfer 0.7's `checkpointing_ssu`, which no op calls.

`fi-ffi build --release 0.7.2.post1 MODULE` makes the module (4 minutes on two cores). A call takes
each request's last tokens from a ring, goes on from its state over those that were accepted, and
then over T new ones. It puts the new ones into the ring, and the state forward only when the ring
would be full. vLLM's `CheckpointingSSURunner` calls the same entry, with the numbers at the end
that it finds by trying: zeros leave them to the launcher. `scratch` is what
`allocate_checkpointing_ssu_scratch` allocates, for the way with two kernels.
"""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers.untyped_calls import BF16, HALF, call, float64, module, poisoned

MODULE = (
    "checkpointing_ssu_s_f32_i_bf16_dt_bf16_w_bf16_a_f32_si_i32_d_64_ds_128_np_4_mw_8_hpg_8_ng_2"
)
HEADS, GROUPS, DIM, STATE, TOKENS, WINDOW, SLOTS = 16, 2, 64, 128, 4, 8, 5
RING = WINDOW + TOKENS
ERROR = 2.0**-7  # of what is added up: inputs of matrix units are rounded to bfloat16


def softplus(x):
    return np.logaddexp(0, x)


class Request:
    """A request in float64: the state after its accepted tokens, and the sizes of its terms."""

    def __init__(self, state):
        self.state, self.size = float64(state), np.abs(float64(state))

    def step(self, x, dt, a, b):
        """One token: x [heads, dim], dt [heads], b [groups, state]."""
        keep = np.exp(a * dt)[:, None, None]
        new = (dt[:, None] * x)[..., None] * b.repeat(HEADS // GROUPS, axis=0)[:, None]
        self.state, self.size = keep * self.state + new, keep * self.size + np.abs(new)

    def answer(self, x, c, d, z):
        """The output [heads, dim], and the sum of the magnitudes of its terms."""
        c = c.repeat(HEADS // GROUPS, axis=0)
        y = np.einsum("hds,hs->hd", self.state, c) + d[:, None] * x
        size = np.einsum("hds,hs->hd", self.size, np.abs(c)) + np.abs(d[:, None] * x)
        gate = z / (1 + np.exp(-z))
        return y * gate, size * np.abs(gate)

    def copy(self):
        made = Request(self.state)
        made.size = self.size
        return made


def judge(got, expected, size):
    """An error of a tenth is seen, and there is none."""
    bound = ERROR * size + HALF[BF16] * np.abs(expected) + 1e-30
    assert (np.abs(0.1 * expected) / bound).max() > 1
    assert (np.abs(float64(got) - expected) / bound).max() <= 1


@pytest.mark.parametrize("kernels", [1, 2])
def test_drafts_of_several_steps(kernels, rng, to_gpu, stream):
    (symbol,) = (found := module(MODULE)).entries()
    entry = found.entry(symbol)
    slots = np.array([3, 1], np.int32)
    state = rng.standard_normal((SLOTS, HEADS, DIM, STATE)).astype(np.float32)
    a = -np.exp(rng.uniform(-2, 1, HEADS)).astype(np.float32)
    d, bias = (rng.standard_normal(HEADS).astype(BF16) for _ in range(2))
    caches = {
        "x": to_gpu(np.zeros((SLOTS, HEADS, RING, DIM), BF16)),
        "B": to_gpu(np.zeros((SLOTS, GROUPS, RING, STATE), BF16)),
        "dt": to_gpu(np.zeros((SLOTS, HEADS, RING), np.float32)),
    }
    on_gpu, starts, counts = to_gpu(state), np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32)
    scratch = [None, None, None]
    if kernels == 2:
        # Of 16 new tokens and 8 old ones, as matrix units have them.
        scratch = [to_gpu(poisoned((2, HEADS, 32, 8), BF16)),
                   to_gpu(poisoned((2, HEADS, 16), np.float32)),
                   to_gpu(poisoned((2, HEADS, 32, 4), BF16))]  # fmt: skip
    requests = [Request(state[slot]) for slot in slots]
    flushed = False
    for _ in range(6):
        x, z = (rng.standard_normal((2, TOKENS, HEADS, DIM)).astype(BF16) for _ in range(2))
        b, c = (rng.standard_normal((2, TOKENS, GROUPS, STATE)).astype(BF16) for _ in range(2))
        dt = rng.uniform(-3, 0, (2, TOKENS, HEADS)).astype(BF16)
        out = to_gpu(poisoned(x.shape, BF16))
        placed = {name: to_gpu(array) for name, array in (("dt", dt), ("a", a), ("d", d),
                                                          ("bias", bias))}  # fmt: skip

        def tied(name, shape, strides, placed=placed):
            """One number for each head, for all its elements."""
            desc = placed[name].desc()
            return fi_ffi.TensorDesc(desc.ptr, shape, desc.dtype.name, strides=strides)

        tied_dt = tied("dt", (2, TOKENS, HEADS, DIM), (TOKENS * HEADS, HEADS, 1, 0))
        call(entry, on_gpu, to_gpu(x), tied_dt, tied("a", (HEADS, DIM, STATE), (1, 0, 0)),
             to_gpu(b), to_gpu(c), out, caches["x"], caches["B"], caches["dt"], to_gpu(starts),
             to_gpu(counts), tied("d", (HEADS, DIM), (1, 0)), to_gpu(z),
             tied("bias", (HEADS, DIM), (1, 0)), True, to_gpu(slots), -1, None, None, 1, None,
             *scratch, 0, 0, 0, stream=stream)  # fmt: skip
        got, times = out.get(), softplus(float64(dt) + float64(bias))
        states = on_gpu.get()
        for i, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            start, count = int(starts[slot]), int(counts[slot])
            ahead = request.copy()
            for t in range(TOKENS):
                ahead.step(float64(x[i, t]), times[i, t], float64(a), float64(b[i, t]))
                judge(got[i, t], *ahead.answer(*map(float64, (x[i, t], c[i, t], d, z[i, t]))))
                row = (start + count + t) % RING
                assert (caches["x"].get()[slot, :, row] == x[i, t]).all()
                assert (caches["B"].get()[slot, :, row] == b[i, t]).all()
                np.testing.assert_allclose(caches["dt"].get()[slot, :, row], times[i, t], 1e-4)
            if count + TOKENS > WINDOW:  # the state goes forward over the accepted tokens
                flushed = True
                judge(states[slot], request.state, request.size)
                starts[slot], counts[slot] = (start + count) % RING, 0
            accepted = int(rng.integers(1, TOKENS + 1))
            for t in range(accepted):
                request.step(float64(x[i, t]), times[i, t], float64(a), float64(b[i, t]))
            counts[slot] += accepted
        others = [slot for slot in range(SLOTS) if slot not in slots]
        assert (states[others] == state[others]).all()
    assert flushed
    assert all(array.intact() for array in (on_gpu, *caches.values()))
