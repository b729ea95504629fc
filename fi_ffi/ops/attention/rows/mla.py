"""Multi-head latent attention over a paged cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.attention.rows.arguments import (
    CAUSAL,
    F16,
    FAR,
    LSE,
    MASK_MODE,
    SM_SCALE,
    WORKSPACE,
    index,
    maybe,
    number,
    plan,
    row,
)
from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import PlanInfo, Row, Tensor, Vector

# From 0.7.0 on the planner leaves the copy to the device to its caller, and returns a tuple.
_RELEASES = ">=0.6.3,<0.7.0"
# Before, a page's place was computed in 32 bits, and the tile before the first was loaded for
# a request without keys.
_SOUND = "0.6.11"


def _caches(**more: Any) -> tuple[Tensor, Tensor]:
    return (
        Tensor("ckv_cache", "num_pages page_size head_dim_ckv", "KV",
               "compressed keys and values", stride_limit=2**32, **more),
        Tensor("kpe_cache", "num_pages page_size head_dim_kpe", "KV",
               "keys' part with the encoding", stride_limit=2**32, **more),
    )  # fmt: skip


def _mla(kind: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    variant = "" if kind == "fa2" else f"_{kind}"
    source = f"batch_mla{'_sm90' if variant else ''}_binding.cu"
    heads = number("num_heads", "heads of the queries", int)
    planned = plan(
        "batch_mla", variant, source,
        index("qo_indptr", "b+1", "where each request's queries start", host=True),
        index("kv_indptr", "b+1", "where each request's pages start", host=True),
        index("kv_len", "b", "tokens of each request", host=True),
        heads, number("head_dim_o", "of the output", int), CAUSAL, releases=_RELEASES,
    )  # fmt: skip
    run = row(
        "batch_mla", "run", variant, source, "Multi-head latent attention over a paged cache.",
        *WORKSPACE, PlanInfo(),
        Tensor("q_nope", "nnz_qo num_heads head_dim_ckv", "Q", "queries, absorbed"),
        Tensor("q_pe", "nnz_qo num_heads head_dim_kpe", "Q", "queries' part with the encoding"),
        *_caches(offset_limit=2**32, until=_SOUND), *_caches(offset_limit=FAR, since=_SOUND),
        index("kv_indices", "num_indices", "the pages"),
        Tensor("o", "nnz_qo num_heads head_dim_ckv", "Q", "the output", writes=True, reads=False),
        replace(LSE, axes="nnz_qo num_heads", doc="gets the log-sum-exp of each row"),
        MASK_MODE, heads, number("page_size", "tokens in a page", int), SM_SCALE,
        number("return_lse_base_on_e", "natural logarithms, not those to base 2", bool),
        number("ckv_scale", "scale of an fp8 cache's compressed keys and values", since="0.6.14"),
        number("kpe_scale", "scale of an fp8 cache's part with the encoding", since="0.6.14"),
        replace(maybe("maybe_ckv_scale_arr", "num_scales", "float32", "scales of an fp8 cache",
                      "0.6.18"), as_object=False),
        releases=_RELEASES, dtypes={"Q": F16, "KV": F16},
        vector=Vector(("head_dim_ckv", "head_dim_kpe")), nothing_axis="nnz_qo",
        requires=("num_heads >= 1", "page_size >= 1", "head_dim_ckv in (512,)",
                  "head_dim_kpe in (64,)"),
    )  # fmt: skip
    return forms_of(planned), forms_of(run)


MLA = {kind: _mla(kind) for kind in ("fa2", "fa3")}
# Runs whose every request needs a key.
NEED_KEYS = frozenset(
    form for _, runs in MLA.values() for form in runs if form.releases.endswith(f"<{_SOUND}")
)
