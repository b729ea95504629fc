"""Ops of `fi_ffi.ops.table.rope_quantize` in float64, from their definition: see exact.py."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact_rope import table, turned
from fi_ffi.reference.formula import Exact, Formula, Inputs

_Value = tuple[Array, Array]


def _scaled(value: Array, magnitude: Array, scale: float, largest: float) -> _Value:
    """Within the dtype's range, and beyond it the largest that it has."""
    return np.clip(value * scale, -largest, largest), np.abs(magnitude) * scale


def _parts(a: Inputs, of: str, scale: float, largest: float) -> tuple[_Value, _Value]:
    """The part that is turned, and the rest."""
    value, magnitude = turned(a[f"{of}_rope_in"], table(a), a["interleave"])
    rest = a[f"{of}_nope_in"]
    return _scaled(value, magnitude, scale, largest), _scaled(rest, rest, scale, largest)


def _queries(a: Inputs) -> dict[str, _Value]:
    rope, nope = _parts(a, "q", a["quant_scale_q"], a["largest"]["q_rope_out"])
    return {"q_rope_out": rope, "q_nope_out": nope}


def _keys(a: Inputs) -> tuple[_Value, _Value]:
    return _parts(a, "k", a["quant_scale_kv"], a["largest"]["q_rope_out"])


def rope_quantize(a: Inputs) -> Exact:
    rope, nope = _keys(a)
    return {**_queries(a), "k_rope_out": rope, "k_nope_out": nope}


def _appended(a: Inputs, cache: Array, new: _Value) -> _Value:
    """A cache [pages, entries, ...] with the tokens in it, one after another."""
    after, magnitude = cache.copy(), np.zeros_like(cache)
    size = cache.shape[1]
    indices, indptr = a["kv_indices"].astype(int), a["kv_indptr"].astype(int)
    requests, positions = a["batch_indices"].astype(int), a["positions"].astype(int)
    for token, (request, position) in enumerate(zip(requests, positions, strict=True)):
        page = indices[indptr[request] + position // size]
        entry = page, position % size
        after[entry], magnitude[entry] = new[0][token], new[1][token]
    return after, magnitude


def rope_quantize_append_paged_kv_cache(a: Inputs) -> Exact:
    rope, nope = _keys(a)
    values = _scaled(a["v_in"], a["v_in"], a["quant_scale_kv"], a["largest"]["q_rope_out"])
    keys = tuple(np.concatenate(pair, axis=-1) for pair in zip(rope, nope, strict=True))
    swap = (0, 2, 1, 3) if a["kv_layout"] == "HND" else (0, 1, 2, 3)
    caches = {}
    for name, (value, magnitude) in (("k_cache", keys), ("v_cache", values)):
        both = _appended(a, a[name].transpose(swap), (value, magnitude))
        caches[name] = (both[0].transpose(swap), both[1].transpose(swap))
    return {**_queries(a), **caches}


def rope_quantize_append_paged_mla_kv_cache(a: Inputs) -> Exact:
    (rope, rope_size), (nope, nope_size) = _keys(a)
    kpe = _appended(a, a["kpe_cache"], (rope[:, 0], rope_size[:, 0]))
    ckv = _appended(a, a["ckv_cache"], (nope[:, 0], nope_size[:, 0]))
    return {**_queries(a), "ckv_cache": ckv, "kpe_cache": kpe}


EXACT: dict[str, Formula] = {
    formula.__name__: formula
    for formula in (
        rope_quantize,
        rope_quantize_append_paged_kv_cache,
        rope_quantize_append_paged_mla_kv_cache,
    )
}
