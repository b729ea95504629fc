"""The gated delta rule in numpy: token by token, in float64.

Unlike the kernel, which takes tiles of 64 tokens, it looks at `cu_seqlens`: on a GPU a
sequence without tokens never ends, and one past the end is read past the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array, store

_TILE = 64


def _check_starts(cu_seqlens: Array, tokens: int) -> None:
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > tokens:
        raise IndexError(f"cu_seqlens goes from {cu_seqlens[0]} to {cu_seqlens[-1]} of {tokens}")
    if (lengths < 1).any():
        at = int(np.argmax(lengths < 1))
        raise ValueError(f"sequence {at} has {lengths[at]} tokens: a GPU would never end")


def gdn_prefill(
    output: Array,
    output_state: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    input_state: Array | None,
    alpha: Array | None,
    beta: Array | None,
    scale: float,
    workspace_buffer: Array,
    state_checkpoints: Array | None = None,
    checkpoint_cu_starts: Array | None = None,
    checkpoint_every_n_tokens: int = 0,
) -> None:
    del workspace_buffer
    tokens, heads, size = output.shape
    _check_starts(cu_seqlens, tokens)
    scale = scale or size**-0.5
    # A head of k (and q or v) serves as many heads of the output as there are more of those.
    q, k, v = (np.repeat(x.astype(np.float64), heads // x.shape[1], axis=1) for x in (q, k, v))
    gates = np.ones((2, tokens, heads))
    for gate, given in zip(gates, (alpha, beta), strict=True):
        if given is not None:
            gate[...] = given
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        state = np.zeros((heads, size, size))
        if input_state is not None:
            state[...] = input_state[i]
        # The kernel keeps a checkpoint wherever so many tiles were begun, the last one too.
        every = checkpoint_every_n_tokens
        ends = range(every - _TILE + 1, end - start + 1, every) if every else ()
        kept = {min(t + _TILE - 1, int(end - start)): n for n, t in enumerate(ends)}
        for t in range(start, end):
            state *= gates[0, t, :, None, None]
            written = gates[1, t, :, None] * (v[t] - np.einsum("hvk,hk->hv", state, k[t]))
            state += written[:, :, None] * k[t, :, None, :]
            store(output[t], scale * np.einsum("hvk,hk->hv", state, q[t]))
            if t - start + 1 in kept and state_checkpoints is not None:
                assert checkpoint_cu_starts is not None
                place = checkpoint_cu_starts[i] + kept[t - start + 1]
                state_checkpoints[place] = state
        output_state[i] = state


# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "gdn_prefill_sm90": {"gdn_prefill": gdn_prefill},
}
