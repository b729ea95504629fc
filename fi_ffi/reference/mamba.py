"""Mamba's ops, from their definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fi_ffi.reference import philox
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.formula import SLACK, Exact, Expected, Formula, Inputs, OneOfMany
from fi_ffi.reference.indices import check_slot, refusal


def seq_chunk_cumsum(a: Inputs) -> Exact:
    starts = a["chunk_indices"].astype(np.int64) * a["chunk_size"]
    starts += a["chunk_offsets"].astype(np.int64)
    of_pieces = a["seq_idx"].astype(np.int64)[starts]
    sequences = np.arange(len(a["output"]))
    counts = np.searchsorted(of_pieces, sequences).astype(np.int32)
    counts[-1] = len(of_pieces)
    return {"output": (counts, None)}


class _MambaRequest(NamedTuple):
    """A request's tokens, the slot where its state is read (None: none), and the slot to write
    after each token (None: none)."""

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


def _requests(a: Inputs) -> Iterator[_MambaRequest]:
    pad, is_one = a["pad_slot_id"], a["x"].ndim == 3 and "cu_seqlens" not in a
    for i, tokens in enumerate(_tokens(a)):
        first = max(int(a["num_accepted_tokens"][i]) - 1, 0) if "num_accepted_tokens" in a else 0
        slot = i
        if "state_batch_indices" in a:
            slot = _column(a["state_batch_indices"], i, first)
        targets: list[int | None] = [None] * len(tokens)
        kept = slot != pad
        # Unless the algorithm is chosen, the kernels for several tokens serve padded calls.
        if not kept and is_one and "state_scale" in a and a["algorithm"]:
            got = f"{slot} for request {i}"
            raise refusal("state_batch_indices", got, "a slot, whose scale is read")
        if kept and "intermediate_states_buffer" in a:
            of = a.get("intermediate_state_indices")
            entry = slot if of is None else int(of[i])
            name = "state_batch_indices" if of is None else "intermediate_state_indices"
            room = len(a["intermediate_states_buffer"])
            if "intermediate_state_scales" in a:
                room = min(room, len(_tokens(a)))
            check_slot(name, i, entry, room)
            targets = [entry * a["cache_steps"] + step for step in range(len(tokens))]
        elif kept and "dst_state_batch_indices" in a:
            places = [_column(a["dst_state_batch_indices"], i, step) for step in range(len(tokens))]
            if not is_one or not a["disable_state_update"]:
                targets = [None if place == pad else place for place in places]
        elif kept and tokens and not a["disable_state_update"]:
            targets[-1] = slot
        _check_slots(a, i, slot if kept else None, targets)
        yield _MambaRequest(tokens, slot if kept else None, targets)


def _check_slots(a: Inputs, i: int, source: int | None, targets: list[int | None]) -> None:
    """Refuse slots out of range, where a GPU would read and write past the states."""
    argument, count = "state_batch_indices", len(a["state"])
    if source is not None:
        check_slot(argument, i, source, count)
    if "intermediate_states_buffer" not in a:
        argument = f"dst_{argument}" if f"dst_{argument}" in a else argument
        for slot in targets:
            if slot is not None:
                check_slot(argument, i, slot, count)


# Errors of float32: of `__expf`; of `__logf`, absolute near 0; of a sum of products; of a sigmoid.
_EXP, _LOG, _SUM, _SIGMOID = 2.0**-21, 2.0**-18, 2.0**-17, 2.0**-18


def selective_state_update(a: Inputs) -> Exact:
    """Return values, each with the largest error of float32."""
    buffer = a.get("intermediate_states_buffer")
    kept = a["state"] if buffer is None else buffer
    states = kept.reshape(-1, *kept.shape[-3:]).copy()
    off_states = np.zeros_like(states)
    is_written = np.zeros(len(states), bool)
    # The slot where each state was read: random bits are drawn by slot.
    sources = np.zeros(len(states), np.int64)
    before = a["state"]
    if "state_scale" in a:
        before = before * a["state_scale"][..., None]
    out, off_out = a["out"].copy(), np.zeros_like(a["out"])
    decays, skip = a["A"][:, 0, 0], a["D"][:, 0]
    for request in _requests(a):
        slot = request.source
        state = np.zeros(before.shape[1:]) if slot is None else before[slot]
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
                states[target], off_states[target], is_written[target] = state, off, True
                sources[target] = 0 if slot is None else slot
    name = "state" if buffer is None else "intermediate_states_buffer"
    results: dict[str, Expected] = {
        name: (states.reshape(kept.shape), off_states.reshape(kept.shape) / SLACK)
    }
    if "state_scale" in a:
        results |= _of_int16(a, name, states, off_states, is_written)
    elif "rand_seed" in a:
        noise = _noise(a, sources, states.shape)
        results[name] = _rounded_at_random(kept.shape, states, off_states, is_written, noise)
    if buffer is not None:
        results["state"] = (a["state"], np.zeros_like(a["state"]))
        if "state_scale" in a:
            results["state"] = (a["state"].astype(np.int16), None)
            results["state_scale"] = (a["state_scale"].astype(np.float32), None)
    return {"out": (out, off_out / SLACK), **results}


_INT16 = 32767.0


def _of_int16(
    a: Inputs, name: str, states: Array, off: Array, is_written: Array
) -> dict[str, Expected]:
    """Return states as integers, and the scale of each row."""
    of_scales = "state_scale" if name == "state" else "intermediate_state_scales"
    largest = np.abs(states).max(axis=-1)
    encode = _INT16 / np.where(largest > 0, largest, _INT16)
    shape = a[of_scales].shape
    scales = a[of_scales].reshape(-1, *shape[-2:]).copy()
    off_scales = np.zeros_like(scales)
    # There may be more slots for states than scales, which belong to requests.
    at = np.flatnonzero(is_written)
    scales[at] = 1 / encode[at]
    off_scales[at] = off[at].max(axis=-1) / _INT16 + _EXP * scales[at]
    values = np.where(is_written[:, None, None, None], states * encode[..., None], states)
    of_largest = off.max(axis=-1) / np.where(largest > 0, largest, 1.0) + _EXP
    allowed = 0.5 + off * encode[..., None] + np.abs(values) * of_largest[..., None]

    def judge(got: Array) -> tuple[float, float]:
        error = np.abs(got.astype(np.float64).reshape(values.shape) - values)
        fraction = np.where(is_written[:, None, None, None], error / allowed, np.inf)
        fraction = np.where(error == 0, 0.0, fraction)
        return float(error.max(initial=0.0)), float(fraction.max(initial=0.0))

    kept = a[name].shape
    return {
        name: OneOfMany(lambda: np.rint(values).reshape(kept), judge),
        of_scales: (scales.reshape(shape), off_scales.reshape(shape) / SLACK),
    }


def _noise(a: Inputs, sources: Array, shape: tuple[int, ...]) -> Array:
    """Return 13 random bits for each element of the states.

    The kernels for one token draw them with `algorithm="simple"`, and the kernels for several
    tokens always do. A counter is the place in the states where a group of up to four elements was
    read.
    """
    size, dstate = math.prod(shape[1:]), shape[-1]
    place = np.arange(size, dtype=np.int64)
    column = place % dstate
    if a["x"].ndim == 3 and "cu_seqlens" not in a:
        count = min(8, dstate // 32)
        of_group = column % count % 4
        word, shift = of_group, np.zeros_like(column)
    else:
        of_group = column % 4
        word, shift = of_group // 2, of_group % 2 * 16
    counter = (sources[:, None] * size + place - of_group).astype(np.uint64)
    low, zero = np.uint64(0xFFFFFFFF), np.zeros_like(counter)
    seed = np.uint64(int(np.ravel(a["rand_seed"])[0]) % 2**64)
    halves = (counter & low, counter >> np.uint64(32), zero, zero)
    key = (np.full_like(counter, seed & low), np.full_like(counter, seed >> np.uint64(32)))
    words = np.stack(philox.block(halves, key))
    drawn = np.take_along_axis(words, np.broadcast_to(word, counter.shape)[None], axis=0)[0]
    noise: Array = (drawn >> shift.astype(np.uint64) & np.uint64(0x1FFF)).reshape(shape)
    return noise


def at_random(values: Array, noise: Array) -> Array:
    """Round to float16 stochastically: add 13 random bits below the last bit of the magnitude, and
    truncate; subnormal results are 0."""
    bits = values.astype(np.float32).view(np.uint32)
    magnitude = (bits & np.uint32(0x7FFFFFFF)) + noise.astype(np.uint32)
    cut = (magnitude >> np.uint32(13)).astype(np.int64) - (112 << 10)
    cut = np.where(cut < 1 << 10, 0, np.minimum(cut, 31 << 10))
    halves = (cut + (bits >> np.uint32(31)).astype(np.int64) * (1 << 15)).astype(np.uint16)
    result: Array = halves.view(np.float16).astype(np.float64)
    return result


def _rounded_at_random(
    kept: tuple[int, ...], states: Array, off: Array, is_written: Array, noise: Array
) -> OneOfMany:
    """Accept either neighbour in float16, because other kernels draw other random bits."""
    written = is_written[:, None, None, None]
    values = np.where(written, at_random(states, noise), states)
    least, most = np.zeros_like(noise), np.full_like(noise, 0x1FFF)
    sign, size = np.sign(states), np.abs(states)
    near = np.where(written, at_random(np.maximum(size - off, 0), least), size)
    far = np.where(written, at_random(size + off, most), size)

    def judge(got: Array) -> tuple[float, float]:
        found = got.astype(np.float64).reshape(states.shape) * np.where(sign < 0, -1, 1)
        # A state near 0 may have either sign, and on some GPUs may be subnormal.
        is_small = (np.maximum(np.abs(found), size) <= off + 2.0**-14) & written
        is_right = (near <= found) & (found <= far) | is_small
        is_right |= np.isnan(found) & np.isnan(size) & ~written
        error = np.where(written, np.abs(found - size), 0.0)
        return float(error.max(initial=0.0)), 0.0 if is_right.all() else np.inf

    return OneOfMany(lambda: values.reshape(kept), judge)


def _step(a: Inputs, at: tuple[int, ...]) -> tuple[Array, Array]:
    """Return each head's dt, and the largest error of float32 in it."""
    dt = a["dt"][at][..., 0] + (a["dt_bias"][:, 0] if "dt_bias" in a else 0.0)
    if not a["dt_softplus"]:
        return dt, 2.0**-23 * (1 + np.abs(dt))
    dt = np.where(dt <= 20, np.log1p(np.exp(np.minimum(dt, 20))), dt)
    return dt, _LOG * (1 + np.abs(dt))


EXACT: dict[str, Formula] = {
    "seq_chunk_cumsum": seq_chunk_cumsum,
    "selective_state_update": selective_state_update,
}
