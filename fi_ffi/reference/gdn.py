"""The gated delta rule in float64, solved for pieces of a sequence at once.

Each token writes `u`, what is new of its value; those of a piece solve a triangular
system.  With `xp` another array module than numpy, the work is done there.

Unlike the kernel, which takes tiles of 64 tokens, it looks at `cu_seqlens`: on a GPU a sequence
without tokens never ends, and one past the end is read past the tensors.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import Formula

# Tokens solved for at a time.
_PIECE = 256
_TILE = 64


def _decay(alpha: Any, xp: Any) -> Any:
    """[h, i, j]: what is left at token i of what token j wrote."""
    heads, count = alpha.shape
    decay = xp.zeros((heads, count, count))
    for i in range(count):
        if i:
            decay[:, i, :i] = decay[:, i - 1, :i] * alpha[:, i, None]
        decay[:, i, i] = 1
    return decay


def piece(q: Any, k: Any, v: Any, gates: Any, state: Any, xp: Any = np) -> tuple[Any, Any]:
    """What tokens read, [h, n, v] (without the scale), and the state after them."""
    alpha, beta = gates
    decay = _decay(alpha, xp)
    carried = xp.cumprod(alpha, axis=1)[:, :, None]
    system = xp.tril(decay * (k @ k.transpose(0, 2, 1)), -1) * beta[:, :, None]
    system += xp.eye(alpha.shape[1])
    new = beta[:, :, None] * (v - carried * (k @ state.transpose(0, 2, 1)))
    u = xp.linalg.solve(system, new)
    read = (decay * (q @ k.transpose(0, 2, 1))) @ u + carried * (q @ state.transpose(0, 2, 1))
    after = carried[:, -1:] * state + (decay[:, -1, :, None] * u).transpose(0, 2, 1) @ k
    return read, after


def sequence(
    q: Any, k: Any, v: Any, gates: Any, state: Any, every: int = 0, xp: Any = np
) -> tuple[Any, Any, list[Any]]:
    """The same for a sequence of any length, and the states at its checkpoints."""
    length, read, kept = q.shape[1], [], []
    step = math.gcd(every, _PIECE)
    for start in range(0, length, step):
        span = slice(start, start + step)
        gate = [of[:, span] for of in gates]
        out, state = piece(q[:, span], k[:, span], v[:, span], gate, state, xp)
        read.append(out)
        tiles = -(-min(start + step, length) // _TILE)
        if every and not tiles % (every // _TILE):
            kept.append(state)
    return xp.concatenate(read, axis=1), state, kept


def _check_starts(cu_seqlens: Array, tokens: int) -> None:
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > tokens:
        raise IndexError(f"cu_seqlens goes from {cu_seqlens[0]} to {cu_seqlens[-1]} of {tokens}")
    if (lengths < 1).any():
        at = int(np.argmax(lengths < 1))
        raise ValueError(f"sequence {at} has {lengths[at]} tokens: a GPU would never end")


def gdn_prefill(a: dict[str, Any], xp: Any = np) -> dict[str, tuple[Any, Any]]:
    heads, size = a["output_state"].shape[1:3]
    scale = a["scale"] or size**-0.5
    every = a.get("checkpoint_every_n_tokens", 0)
    # [head, token, ...]
    q, k, v = (
        xp.repeat(xp.asarray(a[name]).transpose(1, 0, 2), heads // a[name].shape[1], axis=0)
        for name in "qkv"
    )
    ones = xp.ones((v.shape[1], heads))
    gates = [xp.asarray(a[name]).T if name in a else ones.T for name in ("alpha", "beta")]
    starts = np.asarray(a["cu_seqlens"]).astype(int)
    _check_starts(starts, v.shape[1])
    found: dict[str, list[Any]] = {"output": [], "output_state": [], "state_checkpoints": []}
    sizes: dict[str, list[Any]] = {name: [] for name in found}
    places: list[int] = []  # of checkpoints
    for i, (start, end) in enumerate(pairwise(starts)):
        of_q, of_k, of_v = (x[:, start:end] for x in (q, k, v))
        gate = [of[:, start:end] for of in gates]
        state = (
            xp.asarray(a["input_state"][i]) if "input_state" in a else xp.zeros((heads, size, size))
        )
        of_state = abs(state).max(axis=(1, 2)) + abs(of_v).max(axis=(1, 2))
        read, state, kept = sequence(of_q, of_k, of_v, gate, state, every, xp)
        found["output"].append(scale * read.transpose(1, 0, 2))
        # What is read is a sum over keys: of length 1 as they are, at most that of a row.
        of_read = scale * of_state[:, None] * xp.linalg.norm(of_q, axis=2)
        sizes["output"].append(xp.broadcast_to(of_read.T[:, :, None], (end - start, heads, size)))
        found["output_state"].append(state[None])
        sizes["output_state"].append(xp.broadcast_to(of_state[:, None, None], state.shape)[None])
        if kept:
            first = int(a["checkpoint_cu_starts"][i])
            places += range(first, first + len(kept))
            found["state_checkpoints"] += kept
            sizes["state_checkpoints"] += [sizes["output_state"][-1][0]] * len(kept)
    if places:
        of_places = zip(places, found["state_checkpoints"], sizes["state_checkpoints"], strict=True)
        states = xp.array(a["state_checkpoints"])
        of_states = xp.zeros_like(states)
        for place, one, size_of in of_places:
            states[place], of_states[place] = one, size_of
        found["state_checkpoints"], sizes["state_checkpoints"] = [states], [of_states]
    if starts[-1] < v.shape[1] and "output" in a:
        # Tokens of no sequence stay as they are.
        found["output"].append(xp.asarray(a["output"])[starts[-1] :])
        sizes["output"].append(xp.zeros_like(found["output"][-1]))
    return {
        name: (xp.concatenate(values), xp.concatenate(sizes[name]))
        for name, values in found.items()
        if values and name in a
    }


EXACT: dict[str, Formula] = {"gdn_prefill": gdn_prefill}
