"""The gated delta rule in float64: sequences in pieces, and single tokens.

In a sequence each token writes `u`, the new part of its value; the `u` of a piece solve a
triangular system. With another array module than numpy as `xp`, that module does the work.

The kernel takes tiles of 64 tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fi_ffi.reference.arrays import Array, store_changed
from fi_ffi.reference.formula import SLACK, Exact, Formula, Inputs, as_inputs

# Tokens of a piece.
_PIECE = 256
_TILE = 64


def _decay(alpha: Any, xp: Any) -> Any:
    """Return [h, i, j]: the part of what token j wrote that is left at token i."""
    heads, count = alpha.shape
    decay = xp.zeros((heads, count, count))
    for i in range(count):
        if i:
            decay[:, i, :i] = decay[:, i - 1, :i] * alpha[:, i, None]
        decay[:, i, i] = 1
    return decay


def piece(q: Any, k: Any, v: Any, gates: Any, state: Any, xp: Any = np) -> tuple[Any, Any]:
    """Return what tokens read, [h, n, v], without the scale, and the state after them."""
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
    q: Any,
    k: Any,
    v: Any,
    gates: Any,
    state: Any,
    every: int = 0,
    xp: Any = np,
    is_whole: bool = False,
) -> tuple[Any, Any, list[Any]]:
    """Compute `piece` for a sequence of any length; return also the states at its checkpoints.

    A checkpoint comes after every `every` tokens. A last, partial tile counts as a whole one,
    unless `is_whole`.
    """
    length, read, kept = q.shape[1], [], []
    step = math.gcd(every, _PIECE)
    for start in range(0, length, step):
        span = slice(start, start + step)
        gate = [of[:, span] for of in gates]
        out, state = piece(q[:, span], k[:, span], v[:, span], gate, state, xp)
        read.append(out)
        done = min(start + step, length)
        tokens = done if is_whole else -(-done // _TILE) * _TILE
        if every and not tokens % every:
            kept.append(state)
    return xp.concatenate(read, axis=1), state, kept


def gdn_prefill(
    a: dict[str, Any], xp: Any = np, is_whole: bool = False
) -> dict[str, tuple[Any, Any]]:
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
    results: dict[str, list[Any]] = {"output": [], "output_state": [], "state_checkpoints": []}
    sizes: dict[str, list[Any]] = {name: [] for name in results}
    places: list[int] = []  # where checkpoints are
    for i, (start, end) in enumerate(pairwise(starts)):
        of_q, of_k, of_v = (x[:, start:end] for x in (q, k, v))
        gate = [of[:, start:end] for of in gates]
        state = (
            xp.asarray(a["input_state"][i]) if "input_state" in a else xp.zeros((heads, size, size))
        )
        of_state = abs(state).max(axis=(1, 2)) + abs(of_v).max(axis=(1, 2))
        read, state, kept = sequence(of_q, of_k, of_v, gate, state, every, xp, is_whole)
        results["output"].append(scale * read.transpose(1, 0, 2))
        # An output is a sum over keys of length 1, so it is at most the length of a state's row.
        of_read = scale * of_state[:, None] * xp.linalg.norm(of_q, axis=2)
        sizes["output"].append(xp.broadcast_to(of_read.T[:, :, None], (end - start, heads, size)))
        results["output_state"].append(state[None])
        sizes["output_state"].append(xp.broadcast_to(of_state[:, None, None], state.shape)[None])
        if kept:
            first = int(a["checkpoint_cu_starts"][i])
            places += range(first, first + len(kept))
            results["state_checkpoints"] += kept
            sizes["state_checkpoints"] += [sizes["output_state"][-1][0]] * len(kept)
    if places:
        of_places = zip(
            places, results["state_checkpoints"], sizes["state_checkpoints"], strict=True
        )
        states = xp.array(a["state_checkpoints"])
        of_states = xp.zeros_like(states)
        for place, one, size_of in of_places:
            states[place], of_states[place] = one, size_of
        results["state_checkpoints"], sizes["state_checkpoints"] = [states], [of_states]
    if starts[-1] < v.shape[1] and "output" in a:
        # Tokens of no sequence stay unchanged.
        results["output"].append(xp.asarray(a["output"])[starts[-1] :])
        sizes["output"].append(xp.zeros_like(results["output"][-1]))
    return {
        name: (xp.concatenate(values), xp.concatenate(sizes[name]))
        for name, values in results.items()
        if values and name in a
    }


def gdn_prefill_cute(a: dict[str, Any], xp: Any = np) -> dict[str, tuple[Any, Any]]:
    """Compute the prefill of the CuTe DSL kernels.

    States may be in pools. A sequence may have no tokens, which leaves its state unchanged.
    Checkpoints are at whole pieces.
    """
    starts = np.asarray(a["cu_seqlens"]).astype(int)
    there = np.flatnonzero(np.diff(starts))
    slots = np.asarray(a.get("state_indices", np.arange(len(starts) - 1))).astype(int)[there]
    pool = xp.asarray(a["output_state"])
    states, of_states = xp.array(pool), xp.zeros_like(pool)
    if not len(there):
        return {"output_state": (states, of_states)}
    arguments = {
        **a,
        "cu_seqlens": np.append(starts[there], starts[-1]),
        "output_state": pool[slots],
    }
    for name, places in (("input_state", slots), ("checkpoint_cu_starts", there)):
        if name in a:
            arguments[name] = a[name][places]
    results = gdn_prefill(arguments, xp, is_whole=True)
    states[slots], of_states[slots] = results["output_state"]
    return {**results, "output_state": (states, of_states)}


def _prefill_kernel(*values: Any) -> None:
    """Compute the prefill on the entry's arguments, which are other views of the tensors."""
    arguments = dict(zip(_PREFILL, values, strict=True))
    heads, size = arguments["output_state"].shape[1:3]
    turned: dict[str, Any] = {"q": (0, 2, 1)} | dict.fromkeys(("k", "v", "output"), (1, 2, 0))
    arrays = {
        name: value.transpose(turned[name]) if name in turned else value
        for name, value in arguments.items()
        if value is not None
    }
    gates, states = (-1, heads), (-1, heads, size, size)
    for name, shape in {"alpha": gates, "beta": gates, "state_checkpoints": states}.items():
        if name in arrays:
            arrays[name] = arrays[name].reshape(shape)
    inputs = as_inputs(arrays)
    for name, (value, _) in gdn_prefill_cute(inputs).items():
        store_changed(arrays[name], value, inputs[name])


_PREFILL = (
    "q", "k", "v", "output", "alpha", "beta", "output_state", "input_state", "state_indices",
    "state_checkpoints", "checkpoint_cu_starts", "workspace_buffer", "cu_seqlens", "scale",
    "num_q_heads", "num_k_heads", "num_v_heads", "num_sab_heads", "num_seqs", "total_checkpoints",
    "checkpoint_every_n_tokens", "grid_x",
)  # fmt: skip
KERNELS = {
    "gdn_prefill_sm90": {
        "gdn_prefill_cute": lambda *values: _prefill_kernel(
            *values[:8], *[None] * (len(_PREFILL) - len(values)), *values[8:]
        )
    }
}


# Errors of float32: of an exponential, relative to its argument; of `log1p`, absolute near 0; of a
# sum over keys; and of a length.
_EXP, _LOG, _SUM, _LENGTH = 2.0**-21, 2.0**-20, 2.0**-18, 2.0**-20


class _Value:
    """A number, and the largest error of float32 in it."""

    __slots__ = ("off", "value")

    def __init__(self, value: Any, off: Any) -> None:
        self.value, self.off = value, off


def _decay_of(a: Inputs, i: int, t: int) -> _Value:
    """Return the part of each head's state that is kept before a token."""
    x = a["a"][i, t] + a["dt_bias"]
    step = np.where(x <= 20, np.log1p(np.exp(np.minimum(x, 20))), x)
    rate = np.exp(a["A_log"])
    value = np.exp(-rate * step)
    off = value * (rate * _LOG * (1 + step) + _EXP * (2 + rate * step * (1 + np.abs(a["A_log"]))))
    return _Value(value, off)


def _beta_of(a: Inputs, i: int, t: int) -> _Value:
    """Return how much of a token is written, for each head."""
    return _logistic(a["b"][i, t])


def _logistic(x: Array) -> _Value:
    value = 1 / (1 + np.exp(-x))
    return _Value(value, value * _EXP * (2 + np.abs(x)))


def _of_length_1(
    x: Array, heads: int, is_normalized: bool, scale: float = 1.0, eps: float = 1e-6
) -> Array:
    if is_normalized:
        x = x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)
    return np.repeat(x * scale, heads // len(x), axis=0)


def _step(state: _Value, q: Array, k: Array, v: Array, keep: _Value, share: _Value) -> _Value:
    """Advance every head's state [v, k] by one token, in place; return what the token reads."""
    h = state.value
    # One decay for each head, or for each of its keys.
    kept, off_kept = (of.reshape(len(h), 1, -1) for of in (keep.value, keep.off))
    state.off = state.off * kept + np.abs(h) * (off_kept + _EXP * kept)
    h = h * kept
    k_row = k[:, None, :]
    known = (h * k_row).sum(-1)
    off_known = (state.off * np.abs(k_row)).sum(-1) + (_SUM + _LENGTH) * np.abs(h * k_row).sum(-1)
    part = share.value[:, None]
    new = part * (v - known)
    off_new = part * off_known + share.off[:, None] * np.abs(v - known)
    off_new += _EXP * part * (np.abs(v) + np.abs(known))
    more = new[..., None] * k_row
    state.off = state.off + off_new[..., None] * np.abs(k_row)
    state.off += _LENGTH * np.abs(more) + _EXP * (np.abs(h) + np.abs(more))
    state.value = h + more
    q_row = q[:, None, :]
    read = (state.value * q_row).sum(-1)
    off_read = (state.off * np.abs(q_row)).sum(-1)
    off_read += (_SUM + _LENGTH) * np.abs(state.value * q_row).sum(-1)
    return _Value(read, off_read)


class _Slots(NamedTuple):
    """The slots where a request's state is read and written (None: no slot), and whether the result
    is undefined."""

    source: int | None
    target: int | None
    is_undefined: bool = False


def _indices_of(a: Inputs, written: bool) -> str:
    """Return the argument that has the slots which are read, or written."""
    is_other = written and "output_state_indices" in a
    return "output_state_indices" if is_other else "initial_state_indices"


def _slots_of(a: Inputs, i: int, padding: str) -> _Slots:
    """Return a request's slots; negative indices mean slot 0 ("null slot") or no slot."""
    if "initial_state_indices" not in a:
        return _Slots(i, i)
    source, target = (int(a[_indices_of(a, written)][i]) for written in (False, True))
    if source < 0 and padding != "null slot":
        return _Slots(None, None)
    is_undefined = source < 0
    if target < 0 and padding == "none":
        return _Slots(source, None)
    return _Slots(max(source, 0), max(target, 0), is_undefined)


def _decode(a: Inputs, padding: str, is_zero: bool = False) -> dict[str, tuple[Array, Array]]:
    """Compute a decode.

    `padding` says what negative indices mean: slot 0 for bfloat16 states, and for the written slot
    of one token; no slot for several tokens. With `is_zero`, such a request's output is 0.
    """
    b, tokens, heads, size = a["v"].shape
    before = a["state"].reshape(-1, heads, size, size)
    states, off_states = before.copy(), np.zeros_like(before)
    out, off_out = a["output"].copy(), np.zeros_like(a["output"])
    buffer = a.get("intermediate_states_buffer")
    each = off_each = None
    if buffer is not None:
        each = buffer.reshape(b, tokens, heads, size, size).copy()
        off_each = np.zeros_like(each)
    stays = a["disable_state_update"] or (buffer is not None and padding == "null slot")
    for i in range(b):
        slots = _slots_of(a, i, padding)
        if slots.source is None:
            if is_zero:
                out[i] = 0
            continue
        state = _Value(before[slots.source], 0.0)
        for t in range(tokens):
            q, k = (
                _of_length_1(a[name][i, t], heads, a["use_qk_l2norm"], scale)
                for name, scale in (("q", a["scale"]), ("k", 1.0))
            )
            keep, share = _decay_of(a, i, t), _beta_of(a, i, t)
            read = _step(state, q, k, a["v"][i, t], keep, share)
            out[i, t], off_out[i, t] = read.value, np.inf if slots.is_undefined else read.off
            if each is not None and off_each is not None:
                off = np.inf if slots.is_undefined else state.off
                each[i, t], off_each[i, t] = state.value, off
        if slots.target is not None and not stays:
            states[slots.target] = state.value
            off_states[slots.target] = np.inf if slots.is_undefined else state.off
    of_state = a["state"].shape
    results: dict[str, tuple[Array, Array]] = {
        "output": (out, off_out / SLACK),
        "state": (states.reshape(of_state), off_states.reshape(of_state) / SLACK),
    }
    if buffer is not None and each is not None and off_each is not None:
        off_each = off_each.reshape(buffer.shape) / SLACK
        results["intermediate_states_buffer"] = each.reshape(buffer.shape), off_each
    return results


def _decode_of_keys(a: Inputs) -> Exact:
    """Decode with states as [key, value]."""
    heads, size = a["v"].shape[2:]
    turned = a["state"].reshape(-1, heads, size, size).swapaxes(-1, -2)
    results = dict(_decode({**a, "state": turned}, "none"))
    values, off = (each.swapaxes(-1, -2).reshape(a["state"].shape) for each in results["state"])
    return {**results, "state": (values, off)}


class _KdaRequest(NamedTuple):
    """A request of `recurrent_kda`: the slot where it starts, its tokens, and where the state after
    each goes (negative: it is no token)."""

    source: int
    tokens: list[int]
    targets: list[int]


def _requests_of(a: Inputs, b: int) -> list[_KdaRequest]:
    if "cu_seqlens" not in a:
        return [_KdaRequest(i, [i], [i]) for i in range(b)]
    starts = a["cu_seqlens"].astype(int)
    slots = a["ssm_state_indices"].astype(int).reshape(len(starts) - 1, -1)
    requests = []
    for i, (start, end) in enumerate(pairwise(starts)):
        first = int(a["num_accepted_tokens"][i]) - 1 if "num_accepted_tokens" in a else 0
        source = slots[i, min(max(first, 0), slots.shape[1] - 1)]
        count = min(end - start, slots.shape[1])
        tokens = list(range(start, start + count))
        requests.append(_KdaRequest(max(int(source), 0), tokens, list(map(int, slots[i, :count]))))
    return requests


def _decay_of_keys(a: Inputs, g: Array, heads: int) -> _Value:
    """Return the part of each head's state that is kept before a token, for each key."""
    if "A_log" not in a:
        kept = np.exp(g)
        return _Value(kept, kept * _EXP * (2 + 2 * np.abs(g)))
    each, power = heads // len(a["A_log"]), a["A_log"]
    x = g + np.repeat(a["dt_bias"].reshape(len(power), -1), each, axis=0) if "dt_bias" in a else g
    power = np.repeat(power, each)[:, None]
    rate = np.exp(power)
    if a["has_bound"]:
        y = rate * x
        share = 1 / (1 + np.exp(-y))
        off_share = share * (1 - share) * np.abs(y) * (2 + np.abs(power)) + 2 * share
        step = a["lower_bound"] * share
        kept = np.exp(step)
        return _Value(kept, kept * _EXP * (2 + np.abs(step) + abs(a["lower_bound"]) * off_share))
    step = np.where(x <= 20, np.log1p(np.exp(np.minimum(x, 20))), x)
    kept = np.exp(-rate * step)
    off = kept * (rate * _LOG * (1 + step) + _EXP * (2 + rate * step * (1 + np.abs(power))))
    return _Value(kept, off)


def _kda(a: Inputs) -> Exact:
    """Decode of Kimi's delta attention: a decay for each key."""
    heads = a["v"].shape[2]
    before = a["initial_state"]
    states, off_states = before.copy(), np.zeros_like(before)
    q, k, v, g, out = (
        a[name].reshape(-1, *a[name].shape[2:]) for name in ("q", "k", "v", "g", "output")
    )
    beta, out = a["beta"].reshape(-1, heads), out.copy()
    off_out = np.zeros_like(out)
    # The kernel for several tokens clears what no request has.
    is_cleared = "num_accepted_tokens" in a
    if is_cleared:
        out[int(a["cu_seqlens"][-1]) :] = 0
    for source, tokens, targets in _requests_of(a, len(q)):
        state = _Value(before[source], 0.0)
        for token, target in zip(tokens, targets, strict=True):
            if target < 0:
                if is_cleared:
                    out[token] = 0
                continue
            of_q, of_k = (
                _of_length_1(
                    x[token], heads, a["use_qk_l2norm_in_kernel"], scale, a.get("eps", 1e-6)
                )
                for x, scale in ((q, a["scale"]), (k, 1.0))
            )
            keep, share = _decay_of_keys(a, g[token], heads), _Value(beta[token], 0 * beta[token])
            if a["beta_is_logit"]:
                share = _logistic(beta[token])
            read = _step(state, of_q, of_k, v[token], keep, share)
            states[target], off_states[target] = state.value, state.off
            out[token], off_out[token] = read.value, read.off
    shape = a["output"].shape
    return {
        "initial_state": (states, off_states / SLACK),
        "output": (out.reshape(shape), off_out.reshape(shape) / SLACK),
    }


EXACT: dict[str, Formula] = {
    "recurrent_kda": _kda,
    "recurrent_kda_packed": _kda,
    "recurrent_kda_tokens": _kda,
    "gdn_prefill": gdn_prefill,
    "gdn_prefill_cute": gdn_prefill_cute,
    "gdn_decode": lambda a: _decode(a, "null slot"),
    "gdn_decode_float32": lambda a: _decode(a, "written to null slot", is_zero=True),
    "gdn_decode_float32_tokens": lambda a: _decode(a, "none"),
    "gdn_decode_float32_keys": _decode_of_keys,
}
