"""Mamba's ops from their definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs


def seq_chunk_cumsum(a: Inputs) -> Exact:
    starts = a["chunk_indices"].astype(np.int64) * a["chunk_size"]
    starts += a["chunk_offsets"].astype(np.int64)
    if len(starts) and not 0 <= starts.min() <= starts.max() < len(a["seq_idx"]):
        raise IndexError(f"pieces start at {starts.min()} to {starts.max()}: tokens have no such")
    of_pieces = a["seq_idx"].astype(np.int64)[starts]
    sequences = np.arange(len(a["output"]))
    counts = np.searchsorted(of_pieces, sequences).astype(np.int32)
    counts[-1] = len(of_pieces)
    return {"output": (counts, None)}


class _Request(NamedTuple):
    """Where a request's tokens are, where its state is read (None: from nothing), and where it is
    written after each token (None: nowhere)."""

    tokens: list[tuple[int, ...]]
    source: int | None
    targets: list[int | None]


def _column(indices: Array, i: int, column: int) -> int:
    return int(indices[i] if indices.ndim == 1 else indices[i, column])


def _tokens(a: Inputs) -> list[list[tuple[int, ...]]]:
    if "cu_seqlens" in a:
        starts = a["cu_seqlens"].astype(int)
        return [
            [(token,) for token in range(start, end)] for start, end in itertools.pairwise(starts)
        ]
    if a["x"].ndim == 3:
        return [[(i,)] for i in range(len(a["x"]))]
    return [[(i, step) for step in range(a["x"].shape[1])] for i in range(len(a["x"]))]


def _requests(a: Inputs) -> Iterator[_Request]:
    pad, is_one = a["pad_slot_id"], a["x"].ndim == 3 and "cu_seqlens" not in a
    for i, tokens in enumerate(_tokens(a)):
        if "cu_seqlens" in a and len(tokens) > a["cache_steps"]:
            raise ValueError(f"request {i} has {len(tokens)} tokens, of {a['cache_steps']} at most")
        first = max(int(a["num_accepted_tokens"][i]) - 1, 0) if "num_accepted_tokens" in a else 0
        slot = i
        if "state_batch_indices" in a:
            slot = _column(a["state_batch_indices"], i, first)
        targets: list[int | None] = [None] * len(tokens)
        kept = slot != pad
        if kept and "intermediate_states_buffer" in a:
            of = a.get("intermediate_state_indices")
            entry = slot if of is None else int(of[i])
            targets = [entry * a["cache_steps"] + step for step in range(len(tokens))]
        elif kept and "dst_state_batch_indices" in a:
            places = [_column(a["dst_state_batch_indices"], i, step) for step in range(len(tokens))]
            if not is_one or not a["disable_state_update"]:
                targets = [None if place == pad else place for place in places]
        elif kept and tokens and not a["disable_state_update"]:
            targets[-1] = slot
        _check_slots(a, i, slot if kept else None, targets)
        yield _Request(tokens, slot if kept else None, targets)


def _check_slots(a: Inputs, i: int, source: int | None, targets: list[int | None]) -> None:
    """A GPU would read and write past the states."""
    buffer = a.get("intermediate_states_buffer")
    room = len(a["state"]) if buffer is None else buffer.shape[0] * buffer.shape[1]
    for slot, count in [(source, len(a["state"])), *((target, room) for target in targets)]:
        if slot is not None and not 0 <= slot < count:
            raise IndexError(f"request {i} has state {slot} of {count}")


# float32's errors: of `__expf` and `__logf`, which is absolute near 0, and of a sum of products.
_EXP, _LOG, _SUM, _SIGMOID = 2.0**-21, 2.0**-18, 2.0**-17, 2.0**-18


def selective_state_update(a: Inputs) -> Exact:
    """Values, and beside each how far float32 may be from it."""
    buffer = a.get("intermediate_states_buffer")
    kept = a["state"] if buffer is None else buffer
    states = kept.reshape(-1, *kept.shape[-3:]).copy()
    off_states = np.zeros_like(states)
    out, off_out = a["out"].copy(), np.zeros_like(a["out"])
    decays, skip = a["A"][:, 0, 0], a["D"][:, 0]
    for request in _requests(a):
        slot = request.source
        state = np.zeros(a["state"].shape[1:]) if slot is None else a["state"][slot]
        off = np.zeros_like(state)
        for at, target in zip(request.tokens, request.targets, strict=True):
            dt, off_dt = _step(a, at)
            decay = np.exp(decays * dt)
            off_decay = decay * (np.abs(decays) * off_dt + _EXP * (2 + np.abs(decays * dt)))
            of_group = [
                np.repeat(a[name][at], len(dt) // len(a[name][at]), axis=0) for name in "BC"
            ]
            b, c = (each[:, None, :] for each in of_group)
            x = a["x"][at]
            new = np.einsum("hds,h->hds", state, decay)
            more = np.einsum("hd,h->hd", x, dt)[..., None] * b
            off = off * decay[:, None, None] + np.abs(state) * off_decay[:, None, None]
            off += np.abs(x[..., None] * b) * off_dt[:, None, None]
            off += _EXP * (np.abs(new) + np.abs(more))
            state = new + more
            read = (state * c).sum(-1) + skip[:, None] * x
            off_read = (off * np.abs(c)).sum(-1)
            off_read += _SUM * (np.abs(state * c).sum(-1) + np.abs(skip[:, None] * x))
            if "z" in a:
                z = a["z"][at]
                gate = z / (1 + np.exp(-z))
                off_read = off_read * np.abs(gate) + np.abs(read * gate) * _SIGMOID * (
                    1 + np.abs(z)
                )
                read = read * gate
            out[at], off_out[at] = read, off_read
            if target is not None:
                states[target], off_states[target] = state, off
    name = "state" if buffer is None else "intermediate_states_buffer"
    found = {name: (states.reshape(kept.shape), off_states.reshape(kept.shape) / SLACK)}
    if buffer is not None:
        found["state"] = (a["state"], np.zeros_like(a["state"]))
    return {"out": (out, off_out / SLACK), **found}


def _step(a: Inputs, at: tuple[int, ...]) -> tuple[Array, Array]:
    """How far each head goes, and how far float32 may be from it."""
    dt = a["dt"][at][..., 0] + (a["dt_bias"][:, 0] if "dt_bias" in a else 0.0)
    if not a["dt_softplus"]:
        return dt, 2.0**-23 * (1 + np.abs(dt))
    dt = np.where(dt <= 20, np.log1p(np.exp(np.minimum(dt, 20))), dt)
    return dt, _LOG * (1 + np.abs(dt))


EXACT: dict[str, Formula] = {
    "seq_chunk_cumsum": seq_chunk_cumsum,
    "selective_state_update": selective_state_update,
}
