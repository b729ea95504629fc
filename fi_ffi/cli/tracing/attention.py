"""Attention's entries as formulas: `fi_ffi.reference.exact_attention` of their arguments.

Arguments are those of the rows in `fi_ffi.ops.attention.rows`, in float64, with what their plan
was given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.exact_attention import Options, exact, exact_batch, from_pages
from fi_ffi.reference.formula import Exact, Formula, Inputs

_CAUSAL = 1  # of mask_mode_code


def _options(a: Inputs) -> Options:
    return Options(
        float(a["sm_scale"]),
        causal=a.get("mask_mode_code") == _CAUSAL,
        window_left=a.get("window_left", -1),
        logits_soft_cap=a.get("logits_soft_cap", 0.0),
        sink=a.get("sink"),
    )


def single_decode(a: Inputs) -> Exact:
    one = single_prefill({**a, "q": a["q"][None], "mask_mode_code": 0})
    return {name: (value[0], magnitude[0]) for name, (value, magnitude) in one.items()}  # type: ignore[misc,index]


def single_prefill(a: Inputs) -> Exact:
    k, v = (a[of] if a.get("kv_layout") != "HND" else a[of].swapaxes(0, 1) for of in "kv")
    found = exact(a["q"], k, v, _options(a))
    return {"o": (found.out, found.magnitude), "maybe_lse": (found.lse2, found.spread)}


def _of_batch(
    a: Inputs, q: Array, qo_indptr: Array, keys: Callable[[int], tuple[Array, Array]]
) -> Exact:
    """Of all requests; rows of none, if there are any, are 0."""
    found = exact_batch(q, qo_indptr, keys, _options(a))
    out, magnitude, lse2, spread = (
        np.concatenate([rows, np.zeros((len(q) - len(rows), *rows.shape[1:]))]) for rows in found
    )
    return {"o": (out, magnitude), "maybe_lse": (lse2, spread)}


def paged(a: Inputs) -> Exact:
    """Of a paged cache; without `qo_indptr` each request has one query."""
    indptr, last = a["paged_kv_indptr"], a["paged_kv_last_page_len"]
    layout = a.get("kv_layout", "NHD")

    def keys(request: int) -> tuple[Array, Array]:
        where = indptr, a["paged_kv_indices"], last, request, layout
        return from_pages(a["paged_k_cache"], *where), from_pages(a["paged_v_cache"], *where)

    return _of_batch(a, a["q"], a.get("qo_indptr", np.arange(len(indptr))), keys)


def ragged(a: Inputs) -> Exact:
    k, v = (a[of] if a.get("kv_layout") != "HND" else a[of].swapaxes(0, 1) for of in "kv")

    def keys(request: int) -> tuple[Array, Array]:
        start, stop = (int(place) for place in a["kv_indptr"][request : request + 2])
        return k[start:stop], v[start:stop]

    return _of_batch(a, a["q"], a["qo_indptr"], keys)


def mla(a: Inputs) -> Exact:
    """Without `qo_indptr` each request has one query."""
    indptr, size = a["kv_indptr"], a["ckv_cache"].shape[1]
    last = a["kv_len"] - (np.diff(indptr) - 1) * size

    def keys(request: int) -> tuple[Array, Array]:
        where = indptr, a["kv_indices"], last, request
        ckv, kpe = (from_pages(a[f"{of}_cache"], *where) for of in ("ckv", "kpe"))
        return np.concatenate([ckv, kpe], axis=2), ckv

    q = np.concatenate([a["q_nope"], a["q_pe"]], axis=2)
    return _of_batch(a, q, a.get("qo_indptr", np.arange(len(indptr))), keys)


# By the rows' names.
EXACT: dict[str, Formula] = {
    "single_decode.run": single_decode,
    "single_prefill.run": single_prefill,
    "batch_decode.run": paged,
    "batch_prefill.paged_run": paged,
    "batch_prefill.ragged_run": ragged,
    "batch_prefill_with_attention_sink.paged_run": paged,
    "batch_prefill_with_attention_sink.ragged_run": ragged,
    "batch_mla.run": mla,
}
