"""Ops of `fi_ffi.ops.table.rope_quantize` in float64, from their definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import tokens_first
from fi_ffi.reference.formula import Exact, Formula, Inputs
from fi_ffi.reference.page import places
from fi_ffi.reference.rope import table, turned

_Value = tuple[Array, Array]


def _scaled(value: Array, magnitude: Array, scale: float, largest: float) -> _Value:
    """Scale values, and clip them to the largest number of the dtype."""
    return np.clip(value * scale, -largest, largest), np.abs(magnitude) * scale


def _parts(a: Inputs, of: str, scale: float, largest: float) -> tuple[_Value, _Value]:
    """Return the part that is turned, and the rest."""
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


def _of_requests(a: Inputs) -> Inputs:
    """Drop the padding: tokens of no request."""
    kept = a["batch_indices"] >= 0
    names = (
        "q_rope_in",
        "k_rope_in",
        "q_nope_in",
        "k_nope_in",
        "v_in",
        "pos_ids",
        "batch_indices",
        "positions",
    )
    return a | {name: a[name][kept] for name in names if name in a}


def _written(a: Inputs, name: str, where: Any, new: _Value, layout: str | int = "NHD") -> _Value:
    """Return a tensor with new values in some places, and the magnitude of errors; other elements
    have none."""
    value, magnitude = a[name].copy(), np.zeros_like(a[name])
    tokens_first(value, layout)[where], tokens_first(magnitude, layout)[where] = new
    return value, magnitude


def _place(a: Inputs, cache: Array) -> tuple[Array, Array]:
    """Return the places of the requests' tokens in a cache [pages, entries, ...]."""
    names = ("batch_indices", "positions", "kv_indices", "kv_indptr")
    requests, positions, indices, indptr = (a[name].astype(int) for name in names)
    return places(requests, positions, indices, indptr, cache.shape[1])


def _appended_queries(a: Inputs, kept: Inputs) -> dict[str, _Value]:
    where = a["batch_indices"] >= 0
    return {name: _written(a, name, where, new) for name, new in _queries(kept).items()}


def rope_quantize_append_paged_kv_cache(a: Inputs) -> Exact:
    kept = _of_requests(a)
    rope, nope = _keys(kept)
    values = _scaled(kept["v_in"], kept["v_in"], a["quant_scale_kv"], a["largest"]["q_rope_out"])
    layout = a["kv_layout"]
    place = _place(kept, tokens_first(a["k_cache"], layout))
    keys = tuple(np.concatenate(pair, axis=-1) for pair in zip(rope, nope, strict=True))
    return {
        **_appended_queries(a, kept),
        "k_cache": _written(a, "k_cache", place, (keys[0], keys[1]), layout),
        "v_cache": _written(a, "v_cache", place, values, layout),
    }


def rope_quantize_append_paged_mla_kv_cache(a: Inputs) -> Exact:
    kept = _of_requests(a)
    (rope, rope_size), (nope, nope_size) = _keys(kept)
    place = _place(kept, a["ckv_cache"])
    return {
        **_appended_queries(a, kept),
        "ckv_cache": _written(a, "ckv_cache", place, (nope[:, 0], nope_size[:, 0])),
        "kpe_cache": _written(a, "kpe_cache", place, (rope[:, 0], rope_size[:, 0])),
    }


EXACT: dict[str, Formula] = {
    formula.__name__: formula
    for formula in (
        rope_quantize,
        rope_quantize_append_paged_kv_cache,
        rope_quantize_append_paged_mla_kv_cache,
    )
}
