"""The entries of FlashInfer's attention modules, argument by argument.

A family's modules differ in what they were compiled for, and their names say it
(`fi_ffi.loader.uris`); their entries are the same.  fa3 is for SM90, and has another row,
as has its fp8 form.  The arguments after `enable_pdl` are those that
`flashinfer/jit/attention/modules.py` adds to the binding's.

The names here are of the first form of each row; `of_release` has the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.errors import KernelNotFoundError
from fi_ffi.ops.call.releases import OLDEST, fits, forms_of, span_of
from fi_ffi.ops.call.row import Arg, IntArray, KvLayout, PlanInfo, Row, Rule, Scalar, Tensor, Vector

_Dtypes = dict[str, tuple[str, ...]]
F16 = ("float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
# Keys and values of 4 bits (NVFP4): two e2m1 numbers in a byte, the first in its lower half, and a
# scale in e4m3 for every 16 of a head.  The dtypes that their tensors may have.
FP4 = ("uint8", "float4_e2m1fn_x2")
SCALES = ("float8_e4m3fn", "uint8")
FP4_BLOCK = 16
# Releases in which fa2's planner is told that all requests have as many queries.
UNIFORM = ">=0.6.16"
# Query heads for each key head that decode kernels were compiled for, and in which releases.
DECODE_GROUPS = {1: "", 2: "", 3: "", 4: "", 6: ">=0.6.18", 8: "", 16: ">=0.7.1"}
# The forms of each row, by the first.
FORMS: dict[Row, tuple[Row, ...]] = {}

_HEADS = ("num_qo_heads >= 1", "num_kv_heads >= 1", "page_size >= 1",
          "num_qo_heads % num_kv_heads == 0")  # fmt: skip
_FAR = 2**63  # caches are addressed in 64 bits


def of_release(row: Row, release: str) -> Row:
    """The form that a row has in a release; `KernelNotFoundError` where it has none."""
    for form in FORMS[row]:
        if fits(form, release):
            return form
    raise KernelNotFoundError(
        f"{row.name} can be called in FlashInfer {span_of(FORMS[row])}; "
        f"the kernels in use are of {release}"
    )


def _row(family: str, symbol: str, variant: str, source: str, doc: str, *args: Arg,
         later: Mapping[str, Mapping[str, Any]] | None = None, **fields: Any) -> Row:  # fmt: skip
    """The first form of a row, with what most entries have in common."""
    more: dict[str, Any] = {
        "releases": f">={OLDEST}", "dtypes": {"Q": F16, "KV": F16 + FP8, "O": F16},
        "requires": _HEADS, "vector": Vector(("head_dim_qk", "head_dim_vo")),
        "offset_limit": 2**31,
    } | fields  # fmt: skip
    name = f"{family}.{symbol}"
    forms = forms_of(
        Row(name, family, symbol, f"csrc/{source}", doc, args, variant=variant, **more), later
    )
    FORMS[forms[0]] = forms
    return forms[0]


# Arguments that entries share.


def _index(name: str, axes: str, doc: str, host: bool = False) -> Tensor:
    return Tensor(name, axes, "int32", doc, contiguous=True, host=host)


def _maybe(name: str, axes: str, dtype: str, doc: str, since: str = "") -> Tensor:
    return Tensor(
        name, axes, dtype, doc, as_object=True, optional=True, contiguous=True, since=since
    )


def _number(
    name: str, doc: str, type_: type[int] | type[float] | type[bool] = float, since: str = ""
) -> Scalar:
    return Scalar(name, type_, None, doc, since=since)


_WORKSPACE = (
    Tensor("float_workspace_buffer", "float_bytes", "uint8", "partial results", writes=True),
    Tensor("int_workspace_buffer", "int_bytes", "uint8", "the schedule", writes=True),
)
_STAGING = Tensor(
    "page_locked_int_workspace_buffer", "int_bytes", "uint8",
    "the schedule, before its copy to the device",
    writes=True, host=True,
)  # fmt: skip
_Q = Tensor("q", "nnz_qo num_qo_heads head_dim_qk", "Q", "queries")
_K = Tensor("k", "nnz_kv num_kv_heads head_dim_qk", "KV", "keys", kv=True)
_V = Tensor("v", "nnz_kv num_kv_heads head_dim_vo", "KV", "values", kv=True)
_TMP = Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True)
_OUT = Tensor("o", "nnz_qo num_qo_heads head_dim_vo", "O", "the output", writes=True, reads=False)
_OUT_FA2 = replace(_OUT, contiguous=True)  # fa2's kernels work its strides out themselves
_LSE = Tensor(
    "maybe_lse", "nnz_qo num_qo_heads", "float32",
    "receives each row's log-sum-exp, base 2",
    optional=True, contiguous=True, writes=True, reads=False,
)  # fmt: skip
_PAGED_K = Tensor(
    "paged_k_cache", "num_pages page_size num_kv_heads head_dim_qk", "KV", "the keys' pages",
    kv=True, offset_limit=_FAR, stride_limit=2**32,
)  # fmt: skip
_PAGED_V = replace(
    _PAGED_K, name="paged_v_cache", axes="num_pages page_size num_kv_heads head_dim_vo",
    doc="the values' pages",
)  # fmt: skip
_PAIR = ("paged_k_cache", "paged_v_cache")
_PAGES = (
    _index("paged_kv_indptr", "b+1", "start of each request's pages"),
    _index("paged_kv_indices", "num_indices", "the pages"),
    _index("paged_kv_last_page_len", "b", "tokens in each request's last page"),
)
_QO_INDPTR = _index("qo_indptr", "b+1", "start of each request's queries")
_MASK_MODE = _number("mask_mode_code", "0 none, 1 causal, 2 custom, 3 multi-item scoring", int)
_WINDOW = _number("window_left", "visible tokens to the left; -1: all", int)
_PDL = _number("enable_pdl", "programmatic dependent launch", bool)
_CAUSAL = _number("causal", "True: each query sees the tokens up to its own", bool)
_SLOPES = _maybe("maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes")
_SOFT_CAP = _number("logits_soft_cap", "cap of the logits, `cap * tanh(logits / cap)`; 0: none")
_SM_SCALE = _number("sm_scale", "factor of q @ k")
_FA2_SCALARS = (
    _SOFT_CAP,
    _SM_SCALE,
    _number("rope_rcp_scale", "1 / rope_scale"),
    _number("rope_rcp_theta", "1 / rope_theta"),
)
_SIZES = (
    _number("total_num_rows", "queries in all", int),
    _number("batch_size", "requests", int),
    _number("num_qo_heads", "heads of the queries", int),
    _number("num_kv_heads", "heads of keys and values", int),
    _number("page_size", "tokens in a page", int),
    _number("enable_cuda_graph", "same launch for other lengths", bool),
)
_HEAD_DIMS = (
    _number("head_dim_qk", "of queries and keys", int),
    _number("head_dim_vo", "of values and output", int),
)


def _plan(family: str, variant: str, source: str, *args: Arg, **fields: Any) -> Row:
    """The row of a planner: workspaces, then host arrays and numbers."""
    return _row(
        family, "plan", variant, source, "Schedule a batch.", *_WORKSPACE, _STAGING, *args,
        dtypes={}, vector=Vector(()), result="Array<int>", **fields,
    )  # fmt: skip


# What modules.py adds to prefill, by kernel.

_MULTI_ITEM = (
    _maybe("maybe_prefix_len_ptr", "b", "uint32", "tokens in each request's prefix"),
    _maybe("maybe_token_pos_in_items_ptr", "num_positions", "uint16",
           "each token's position in its item"),
    _maybe("maybe_max_item_len_ptr", "b", "uint16", "tokens in each request's longest item"),
)  # fmt: skip
_ITEMS_LEN = _number("token_pos_in_items_len", "positions for each request", int)
_BLOCK_SCALES = (
    _maybe("maybe_k_cache_sf", "num_k_sf", "uint8", "block scales of NVFP4 keys", "0.6.10"),
    _maybe("maybe_v_cache_sf", "num_v_sf", "uint8", "block scales of NVFP4 values", "0.6.10"),
)


def _in_blocks(of: str, axes: str, what: str) -> Tensor:
    """The scales of keys or values of 4 bits: where those lie that they scale."""
    return Tensor(
        f"maybe_{of}_cache_sf", f"{axes}/{FP4_BLOCK}", "SF", f"block scales of the {what}",
        as_object=True, optional=True, kv=True, alignment=4, in_vectors=False, offset_limit=_FAR,
        since="0.6.10",
    )  # fmt: skip


def _packed(of: Tensor) -> Tensor:
    """The same keys or values in 4 bits each."""
    return replace(of, axes=f"{of.axes}/2", alignment=8, in_vectors=False)


def _with_scales(args: tuple[Arg, ...], k: Tensor, v: Tensor) -> tuple[Arg, ...]:
    """What modules.py adds to fa2's prefill, for keys and values of 4 bits."""
    at = args.index(_BLOCK_SCALES[0])
    scales = _in_blocks("k", k.axes, "keys"), _in_blocks("v", v.axes, "values")
    return (*args[:at], *scales, *args[at + 2 :])


def _scale(of: str, heads: str) -> Tensor:
    return _maybe(f"maybe_scale_{of}", heads, "float32", f"scale of each head of {of}")


_SCALE_V = _scale("v", "num_kv_heads")
_SCALES = (_scale("q", "num_qo_heads"), _scale("k", "num_kv_heads"), _SCALE_V)
_SCALARS = tuple(_number(f"scale_{of}_scalar", f"scale of {of}") for of in "qkv")
_MASK = _maybe("maybe_custom_mask", "mask_bytes", "uint8", "the packed mask")
_MASK_INDPTR = _maybe("maybe_mask_indptr", "b+1", "int32", "start of each request's mask")
_OF_FP8: tuple[Arg, ...] = (*_SCALES, _SM_SCALE, *_SCALARS)
_OF_ONE: dict[str, tuple[Arg, ...]] = {
    "fa2": (_MASK, _SLOPES, *_BLOCK_SCALES, *_FA2_SCALARS),
    "fa3": (_SCALE_V, _SOFT_CAP, _SM_SCALE, _SCALARS[2]),
    "fa3_fp8": _OF_FP8,
}
_OF_BATCH: dict[str, tuple[Arg, ...]] = {
    "fa2": (_MASK, _MASK_INDPTR, _SLOPES, *_MULTI_ITEM, *_BLOCK_SCALES, *_FA2_SCALARS, _ITEMS_LEN),
    "fa3": (*_MULTI_ITEM, _SCALE_V, _SOFT_CAP, _SM_SCALE, _SCALARS[2], _ITEMS_LEN),
    "fa3_fp8": _OF_FP8,
}
_SINK = (
    replace(_maybe("sink", "num_qo_heads", "float32",
                   "a logit of each head that joins the softmax's sum"),
            optional=False),
    _SM_SCALE,
)  # fmt: skip
_SAME: _Dtypes = {"Q": F16, "KV": F16, "O": F16}
_IN_4_BITS: dict[str, Any] = {
    "dtypes": {"Q": F16, "KV": FP4, "O": F16, "SF": SCALES}, "releases": ">=0.6.10",
    "requires": (*_HEADS, "head_dim_qk % 64 == 0", "head_dim_vo % 64 == 0"),
}  # fmt: skip
_DTYPES: dict[str, _Dtypes] = {
    "fa2": {"Q": F16, "KV": F16 + FP8, "O": F16},
    "fa3": _SAME,
    "fa3_fp8": {"Q": FP8, "KV": FP8, "O": F16},
}


def _source(family: str, kind: str) -> str:
    return f"{family}{'' if kind == 'fa2' else '_sm90'}_jit_binding.cu"


# One request.

_OF_DECODE = (_SLOPES, *_FA2_SCALARS)
# Decode kernels store each element of their outputs alone, those of pieces too, and so in fp8.
_DECODE_DTYPES: _Dtypes = {"Q": F16, "KV": F16 + FP8, "O": F16 + FP8}
_LONE_K = replace(_K, contiguous=True)
SINGLE_DECODE = _row(
    "single_decode", "run", "", "single_decode_jit_binding.cu", "Attention of one query.",
    Tensor("q", "num_qo_heads head_dim_qk", "Q", "the query", contiguous=True),
    _LONE_K, replace(_LONE_K, name="v", doc="values"), _TMP,
    replace(_OUT_FA2, axes="num_qo_heads head_dim_qk"), replace(_LSE, axes="num_qo_heads"),
    KvLayout(strided=False), _WINDOW, *_OF_DECODE, requires=(*_HEADS, "nnz_kv >= 1"),
    dtypes=_DECODE_DTYPES,
)  # fmt: skip

SINGLE_PREFILL = {
    kind: _row(
        "single_prefill", "run", "" if kind == "fa2" else f"_{kind}",
        _source("single_prefill", kind), "Attention of one request.", _Q, _K, _V, _TMP,
        _OUT_FA2 if kind == "fa2" else _OUT, _LSE, _MASK_MODE, KvLayout(), _WINDOW, *args,
        dtypes=_DTYPES[kind], nothing_axis="nnz_qo",
    )
    for kind, args in _OF_ONE.items()
}  # fmt: skip
SINGLE_PREFILL["fa2_fp4"] = _row(
    "single_prefill", "run", "_fp4", _source("single_prefill", "fa2"),
    "Attention of one request, over keys and values of 4 bits.", _Q, _packed(_K), _packed(_V), _TMP,
    _OUT_FA2, _LSE, _MASK_MODE, KvLayout(), _WINDOW, *_with_scales(_OF_ONE["fa2"], _K, _V),
    nothing_axis="nnz_qo", **_IN_4_BITS,
)  # fmt: skip

# Batches.

BATCH_DECODE_PLAN = _plan(
    "batch_decode", "", "batch_decode_jit_binding.cu",
    _index("indptr", "b+1", "start of each request's pages", host=True),
    *_SIZES[1:], _WINDOW, _SOFT_CAP, *_HEAD_DIMS,
    Tensor("empty_q_data", "0", "uint8", "of the query's dtype", host=True),
    Tensor("empty_kv_data", "0", "uint8", "of the cache's dtype", host=True),
)  # fmt: skip

BATCH_DECODE_RUN = _row(
    "batch_decode", "run", "", "batch_decode_jit_binding.cu", "Attention of a query a request.",
    *_WORKSPACE, PlanInfo(),
    Tensor("q", "b num_qo_heads head_dim_qk", "Q", "queries"), _PAGED_K, _PAGED_V, *_PAGES,
    replace(_OUT_FA2, axes="b num_qo_heads head_dim_vo"), replace(_LSE, axes="b num_qo_heads"),
    KvLayout(), _WINDOW, _PDL, *_OF_DECODE, same_strides=_PAIR, nothing_axis="b",
    dtypes=_DECODE_DTYPES,
)  # fmt: skip

_FA3_PLAN = (
    _index("qo_indptr", "b+1", "start of each request's queries", host=True),
    _index("kv_indptr", "b+1", "start of each request's pages (or tokens)", host=True),
    _index("kv_len_arr", "b", "tokens in each request", host=True),
    *_SIZES, *_HEAD_DIMS, _CAUSAL, _WINDOW,
)  # fmt: skip
_FA2_PLAN = (
    *_FA3_PLAN,
    _number("fixed_split_size", "pages in each piece of a split request; -1: any", int),
    _number("disable_split_kv", "True: never split requests", bool),
    _number("num_colocated_ctas", "thread blocks reserved for another kernel", int),
    _number(
        "uniform_q_len", "queries of every request, with CUDA graphs; 0: any", int, since="0.6.16"
    ),
)


def _batch(family: str, kind: str, prefix: str, *args: Arg) -> tuple[Row, ...]:
    """A batch-prefill family's rows: plan, ragged_run, paged_run."""
    source, dtypes = _source("batch_prefill", kind), _DTYPES[kind] if not prefix else _SAME
    variant = prefix + ("" if kind == "fa2" else f"_{kind}")
    out = _OUT_FA2 if kind == "fa2" else _OUT
    tail = (out, _LSE, _MASK_MODE, KvLayout(), _WINDOW, _PDL, *args)
    return (
        _plan(family, variant, source, *(_FA2_PLAN if kind == "fa2" else _FA3_PLAN)),
        _row(
            family, "ragged_run", variant, source, "Attention over keys and values side by side.",
            *_WORKSPACE, PlanInfo(), _Q, _K, _V, _QO_INDPTR,
            _index("kv_indptr", "b+1", "start of each request's keys"),
            *tail, dtypes=dtypes, nothing_axis="nnz_qo",
        ),
        _row(
            family, "paged_run", variant, source, "Attention over a paged cache.",
            *_WORKSPACE, PlanInfo(), _Q, _PAGED_K, _PAGED_V, _QO_INDPTR, *_PAGES,
            *tail, dtypes=dtypes, same_strides=_PAIR, nothing_axis="nnz_qo",
        ),
    )  # fmt: skip


# Of each kernel: plan, ragged_run, paged_run.
BATCH_PREFILL = {kind: _batch("batch_prefill", kind, "", *args) for kind, args in _OF_BATCH.items()}
_TAIL_FP4 = (_OUT_FA2, _LSE, _MASK_MODE, KvLayout(), _WINDOW, _PDL)
BATCH_PREFILL["fa2_fp4"] = (
    BATCH_PREFILL["fa2"][0],
    _row(
        "batch_prefill", "ragged_run", "_fp4", _source("batch_prefill", "fa2"),
        "Attention over keys and values of 4 bits, side by side.",
        *_WORKSPACE, PlanInfo(), _Q, _packed(_K), _packed(_V), _QO_INDPTR,
        _index("kv_indptr", "b+1", "start of each request's keys"),
        *_TAIL_FP4, *_with_scales(_OF_BATCH["fa2"], _K, _V), nothing_axis="nnz_qo", **_IN_4_BITS,
    ),
    _row(
        "batch_prefill", "paged_run", "_fp4", _source("batch_prefill", "fa2"),
        "Attention over a paged cache of 4 bits.",
        *_WORKSPACE, PlanInfo(), _Q, _packed(_PAGED_K), _packed(_PAGED_V), _QO_INDPTR, *_PAGES,
        *_TAIL_FP4, *_with_scales(_OF_BATCH["fa2"], _PAGED_K, _PAGED_V), same_strides=_PAIR,
        nothing_axis="nnz_qo", **_IN_4_BITS,
    ),
)  # fmt: skip
BATCH_PREFILL_SINK = {
    kind: _batch("batch_prefill_with_attention_sink", kind, "_sink", *_SINK)
    for kind in ("fa2", "fa3")
}

# Prefill and decode requests of a batch in one persistent launch.  It turns page numbers into
# offsets in 32 bits, and loads values from where the keys' strides say.
_POOL_K = replace(_PAGED_K, name="k_cache", offset_limit=2**32)
BATCH_ATTENTION = (
    _plan(
        "batch_attention", "", "batch_attention_jit_binding.cu",
        _index("qo_indptr", "b+1", "start of each request's queries", host=True),
        _index("kv_indptr", "b+1", "start of each request's pages", host=True),
        _index("kv_len", "b", "tokens in each request", host=True),
        *_SIZES[1:4], _number("head_dim_o", "of the output", int), _CAUSAL,
    ),
    _row(
        "batch_attention", "run", "", "batch_attention_jit_binding.cu",
        "Attention over a paged cache, of prefills and decodes at once.",
        *_WORKSPACE, PlanInfo(), _Q, _POOL_K,
        replace(_POOL_K, name="v_cache", axes=_PAGED_V.axes, doc=_PAGED_V.doc),
        _index("kv_indices", "num_indices", "the pages"), _OUT_FA2, _LSE, _MASK_MODE, KvLayout(),
        *_SIZES[2:5], _number("v_scale", "factor of the output"), _SM_SCALE, _SOFT_CAP,
        *_BLOCK_SCALES, same_strides=("k_cache", "v_cache"), nothing_axis="nnz_qo",
    ),
)  # fmt: skip

# The same over keys and values of 4 bits.  Later releases find scales by strides of their own,
# which their binding sets to 0: every token's scales are then those of the first.
BATCH_ATTENTION_FP4 = (
    BATCH_ATTENTION[0],
    _row(
        "batch_attention", "run", "_fp4", "batch_attention_jit_binding.cu",
        "Attention over a paged cache of 4 bits, of prefills and decodes at once.",
        *(_packed(arg) if isinstance(arg, Tensor) and arg.name in ("k_cache", "v_cache") else arg
          for arg in BATCH_ATTENTION[1].args[:-2]),
        _in_blocks("k", _PAGED_K.axes, "keys"), _in_blocks("v", _PAGED_V.axes, "values"),
        same_strides=("k_cache", "v_cache"), nothing_axis="nnz_qo",
        **_IN_4_BITS | {"releases": ">=0.6.10,<0.6.15"},
    ),
)  # fmt: skip

# Multi-head latent attention over a paged cache.  From 0.7.0 on the planner leaves the copy to
# the device to its caller, and returns how many bytes that is, after the plan's info.
WITH_COPY = "Tuple<Array<int>, int>"
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


# Releases whose kernels take a cache of float8_e4m3fn, with bfloat16 queries.
MLA_FP8 = {"fa2": ">=0.6.18", "fa3": ">=0.6.14"}


_HEADS_OF_MLA = _number("num_heads", "heads of the queries", int)


def _mla_binding(kind: str) -> tuple[str, str]:
    """What tells a kind's rows from fa2's, and its source."""
    source = f"batch_mla{'_sm90' if 'fa3' in kind else ''}_binding.cu"
    return "" if kind == "fa2" else f"_{kind}", source


def _mla_plan(kind: str) -> Row:
    return _plan(
        "batch_mla", *_mla_binding(kind),
        _index("qo_indptr", "b+1", "start of each request's queries", host=True),
        _index("kv_indptr", "b+1", "start of each request's pages", host=True),
        _index("kv_len", "b", "tokens in each request", host=True),
        _HEADS_OF_MLA, _number("head_dim_o", "of the output", int), _CAUSAL,
        later={"0.7.0": {"result": WITH_COPY}},
    )  # fmt: skip


def _mla_run(kind: str) -> Row:
    is_fp8 = kind.endswith("fp8")
    return _row(
        "batch_mla", "run", *_mla_binding(kind), "Multi-head latent attention over a paged cache.",
        *_WORKSPACE, PlanInfo(),
        Tensor("q_nope", "nnz_qo num_heads head_dim_ckv", "Q", "queries, absorbed"),
        Tensor("q_pe", "nnz_qo num_heads head_dim_kpe", "Q", "queries' part with the encoding"),
        *_caches(offset_limit=2**32, until=_SOUND), *_caches(offset_limit=_FAR, since=_SOUND),
        _index("kv_indices", "num_indices", "the pages"),
        Tensor("o", "nnz_qo num_heads head_dim_ckv", "Q", "the output", writes=True, reads=False),
        replace(_LSE, axes="nnz_qo num_heads", doc="receives the log-sum-exp of each row"),
        _MASK_MODE, _HEADS_OF_MLA, _number("page_size", "tokens in a page", int), _SM_SCALE,
        _number("return_lse_base_on_e", "True: natural logarithms; False: base 2", bool),
        _number("ckv_scale", "scale of an fp8 cache's compressed keys and values", since="0.6.14"),
        _number("kpe_scale", "scale of an fp8 cache's part with the encoding", since="0.6.14"),
        Tensor("maybe_ckv_scale_arr", "num_pages page_size head_dim_ckv/128", "float32",
               "scales of an fp8 cache", optional=True, contiguous=True, in_vectors=False,
               offset_limit=2**32, since="0.6.18"),
        dtypes={"Q": ("bfloat16",), "KV": ("float8_e4m3fn",)} if is_fp8 else {"Q": F16, "KV": F16},
        releases=MLA_FP8[kind[:3]] if is_fp8 else f">={OLDEST}",
        vector=Vector(("head_dim_ckv", "head_dim_kpe")), nothing_axis="nnz_qo",
        requires=("num_heads >= 1", "page_size >= 1", "head_dim_ckv in (512,)",
                  "head_dim_kpe in (64,)"),
    )  # fmt: skip


# Of each kernel: plan, run.
BATCH_MLA = {kind: (_mla_plan(kind), _mla_run(kind)) for kind in ("fa2", "fa3")}
BATCH_MLA |= {f"{kind}_fp8": (BATCH_MLA[kind][0], _mla_run(f"{kind}_fp8")) for kind in MLA_FP8}
# Runs whose every request needs a key.
NEED_KEYS = frozenset(
    form for _, run in BATCH_MLA.values() for form in FORMS[run]
    if form.releases.endswith(f"<{_SOUND}")
)  # fmt: skip

# xqa, decode attention for queries that share keys.  The kernels turn the caches' strides into
# heads, read those of the keys for both, and count heads in 32 bits.  A request's pieces meet in
# `scratch`, where their sum is found by whoever is last to count up its semaphore, which is 0
# again then.

_ONE: dict[str, Any] = {"optional": True, "contiguous": True}
_CACHE = "num_pages page_size num_kv_heads head_dim"
# Rows of queries, of at most 256 elements and two numbers each, for every piece of a request;
# there are no more pieces than multiprocessors.
XQA_ROWS, _HEAD_DIM = 32, 256
SCRATCH_BYTES = XQA_ROWS * (4 * _HEAD_DIM + 8) + 1024
_GRID = 2**16 - 1  # blocks along a grid's second and third dimension


def semaphore_bytes(sizes: Mapping[str, int]) -> int:
    """A counter for each request and head of the keys, which both kernels number in that order."""
    return 4 * sizes["b"] * sizes["num_kv_heads"]


# The kernel for Hopper has both in one dimension of its grid, the other one has two for them.
_IN_A_GRID = Rule(
    "q", f"not run_sm90_fp8_mha or b * num_kv_heads <= {_GRID}",
    f"b * num_kv_heads of at most {_GRID}: the kernel has a block for each",
)  # fmt: skip

_XQA_ARGS: tuple[Arg, ...] = (
    _number("run_sm90_fp8_mha", "in fp8, by the kernel for Hopper", bool),
    _number("multiProcessorCount", "multiprocessors to use", int),
    _number("nbKHeads", "heads of the keys", int),
    _number("slidingWinSize", "visible keys, the last ones; 0: all", int),
    _number("qScale", "of the queries"),
    Tensor("qScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    Tensor("output", "b 1 num_qo_heads head_dim", "O", "the output", writes=True, reads=False,
           contiguous=True),
    _number("rcpOutScale", "factor of an fp8 output"),
    Tensor("q", "b 1 num_qo_heads head_dim", "Q", "the queries", contiguous=True),
    Tensor("attentionSinks", "num_kv_heads group", "float32", "a logit more", **_ONE),
    Tensor("kCacheVLLM", _CACHE, "KV", "the keys' pages", offset_limit=_FAR),
    Tensor("vCacheVLLM", _CACHE, "KV", "the values' pages", offset_limit=_FAR),
    Tensor("kSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit keys", optional=True, since="0.6.7"),
    Tensor("vSfCacheVLLM", _CACHE, "uint8", "scales of 4-bit values", optional=True,
           since="0.6.7"),
    Tensor("kvCachePageList", "b max_pages", "int32", "each request's pages", contiguous=True),
    _number("maxSeqLen", "room for keys in the pages", int),
    Tensor("seqLen", "b 1", "LEN", "each request's keys", contiguous=True),
    _number("batchSize", "requests", int),
    _number("kvCacheScale", "of keys and values"),
    Tensor("kvScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    _number("qSeqLen", "queries in each request", int),
    Tensor("qCuSeqLens", "b+1", "uint32", "start of each request's queries", since="0.6.16",
           **_ONE),
    Tensor("mask", "b q_seq_len mask_words", "uint16", "bits", **_ONE),
    Tensor("semaphores", "num_semaphores", "uint32", "0, and so afterwards", writes=True,
           contiguous=True, bytes_for=semaphore_bytes, zeroed=True),
    Tensor("scratch", "scratch_size", "uint8", "partial results", writes=True, reads=False,
           contiguous=True, alignment=128, bytes_per_multiprocessor=SCRATCH_BYTES),
    _number("enable_pdl", "programmatic dependent launch", bool),
)  # fmt: skip
# The kernels read lengths as uint32; no length has other bits as int32.
_LENGTHS: _Dtypes = {"LEN": ("uint32", "int32")}
_XQA: dict[str, Any] = {
    "dtypes": {"Q": F16, "KV": (*F16, "float8_e4m3fn"), "O": (*F16, "float8_e4m3fn")} | _LENGTHS,
    "vector": Vector(("head_dim",)), "same_strides": ("kCacheVLLM", "vCacheVLLM"),
    "requires": (*_HEADS, "page_size in (16, 32, 64, 128)", "head_dim % 16 == 0",
                 f"b <= {_GRID}", f"num_kv_heads <= {_GRID}", _IN_A_GRID),
    "capabilities": (9, 10, 11, 12), "nothing_axis": "b", "offset_limit": _FAR,
}  # fmt: skip
XQA = _row(
    "xqa", "xqa_wrapper", "", "flashinfer_xqa_binding.cu",
    "Attention of one query of each request over a paged cache.", *_XQA_ARGS, **_XQA,
)  # fmt: skip


# Several queries a request, for speculative decoding: `XQA_ROWS` rows of queries and heads are a
# block's, and so are a counter and the pieces.


def query_blocks(q_seq_len: int, group: int) -> int:
    """Blocks that the queries of a request are, for each head of keys."""
    return -(-q_seq_len * group // XQA_ROWS)


def _counters(sizes: Mapping[str, int]) -> int:
    group = sizes["num_qo_heads"] // max(sizes["num_kv_heads"], 1)
    return semaphore_bytes(sizes) * query_blocks(sizes["q_seq_len"], group)


def _of_several(arg: Arg) -> Arg:
    """An argument of `xqa` as it is for several queries."""
    if not isinstance(arg, Tensor):
        return arg
    if arg.name in ("q", "output"):
        return replace(arg, axes="b 1 q_seq_len num_qo_heads head_dim")
    if arg.name == "mask":
        return replace(arg, alignment=4)
    return replace(arg, bytes_for=_counters) if arg.name == "semaphores" else arg


XQA_SPEC_DEC = _row(
    "xqa", "xqa_wrapper", "_spec_dec", "flashinfer_xqa_binding.cu",
    "Attention of several queries of each request over a paged cache.",
    *map(_of_several, _XQA_ARGS), **_XQA,
)  # fmt: skip

# Latent attention by the same kernels, for SM120: 128 heads of queries and one of keys, of which
# the values are the first 512 elements.  `q_scale` is all that logits are multiplied by but
# `kv_scale`.  Each request has four blocks and two buffers in `scratch`, of 128 rows of
# probabilities for a tile of keys, 64 bytes each, and two numbers; nothing counts semaphores up.
MLA_HEADS, MLA_DIM, MLA_DIM_VO = 128, 576, 512
_MLA_BUFFERS = 2 * MLA_HEADS * (64 + 8)
_MLA_CACHE = "num_pages 1 page_size head_dim"
XQA_MLA = _row(
    "xqa_mla", "xqa_wrapper_mla", "", "flashinfer_xqa_binding.cu",
    "Multi-head latent attention of one query of each request over a paged cache.",
    _number("multiProcessorCount", "multiprocessors to use", int),
    _number("qScale", "what logits are multiplied by"),
    Tensor("qScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    Tensor("output", f"b 1 num_qo_heads {MLA_DIM_VO}", "bfloat16", "the output", writes=True,
           reads=False, contiguous=True),
    Tensor("q", "b 1 num_qo_heads head_dim", "Q", "the queries, absorbed", contiguous=True),
    Tensor("kCacheVLLM", _MLA_CACHE, "Q", "the keys' pages", offset_limit=_FAR),
    Tensor("vCacheVLLM", _MLA_CACHE, "Q", "the values' pages", offset_limit=_FAR),
    Tensor("kvCachePageList", "b max_pages", "int32", "each request's pages", contiguous=True),
    _number("maxSeqLen", "room for keys in the pages", int),
    Tensor("seqLen", "b 1", "LEN", "each request's keys", contiguous=True),
    _number("batchSize", "requests", int),
    _number("kvCacheScale", "of keys and values"),
    Tensor("kvScaleTensor", "1", "float32", "the same, on the device", **_ONE),
    Tensor("semaphores", "num_semaphores", "uint32", "0, and so afterwards", writes=True,
           contiguous=True, bytes_for=lambda sizes: 4 * sizes["b"], zeroed=True),
    Tensor("scratch", "scratch_size", "uint8", "partial results", writes=True, reads=False,
           contiguous=True, alignment=128, bytes_for=lambda sizes: _MLA_BUFFERS * sizes["b"]),
    _number("enable_pdl", "programmatic dependent launch", bool),
    dtypes={"Q": ("bfloat16", "float8_e4m3fn")} | _LENGTHS, vector=Vector(("head_dim",)),
    same_strides=("kCacheVLLM", "vCacheVLLM"), capabilities=(12,), nothing_axis="b",
    offset_limit=_FAR,
    requires=(f"num_qo_heads in ({MLA_HEADS},)", f"head_dim in ({MLA_DIM},)",
              "page_size in (16, 32, 64, 128)", f"b <= {_GRID}"),
)  # fmt: skip


# POD: a request's prefill and a batch's decode in one launch.  Both kinds of cache are handed
# over as NHD views, whatever their order.


def _of(part: str, *args: Arg) -> tuple[Arg, ...]:
    """Arguments of the prefill (p) or of the decode (d)."""
    return tuple(replace(arg, name=f"{arg.name}_{part}") for arg in args)


_LAYOUT = _number("layout", "0: tokens before heads", int)
_UNUSED_SLOPES = Tensor(
    "maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes: unused", **_ONE
)
_QUERIES, _QUERY = "qo_len num_qo_heads head_dim", "b num_qo_heads head_dim"
_POD_PREFILL = (
    Tensor("q", _QUERIES, "Q", "the request's queries"),
    Tensor("k", "kv_len num_kv_heads head_dim", "KV", "its keys"),
    Tensor("v", "kv_len num_kv_heads head_dim", "KV", "its values"),
    Tensor("tmp", "tmp_size", "uint8", "partial results", writes=True, reads=False, alignment=16),
    replace(_OUT_FA2, axes=_QUERIES, doc="its output"),
    replace(_LSE, axes="qo_len num_qo_heads"),
    _MASK_MODE,
    _LAYOUT,
    _WINDOW,
    Tensor("maybe_custom_mask", "mask_bytes", "uint8", "which keys each query sees", **_ONE),
    _UNUSED_SLOPES,
    *_FA2_SCALARS,
)
_POD_DECODE = (
    Tensor("q", _QUERY, "Q", "a query of each request"),
    replace(_PAGED_K, axes=_CACHE, kv=False),
    replace(_PAGED_V, axes=_CACHE, kv=False),
    _index("qo_indptr", "b+1", "where each request's query is"),
    *_PAGES,
    replace(_OUT_FA2, axes=_QUERY, doc="their outputs"),
    replace(_LSE, axes="b num_qo_heads"),
    _MASK_MODE,
    _LAYOUT,
    _WINDOW,
    Tensor("maybe_custom_mask", "d_mask_bytes", "uint8", "unused", **_ONE),
    Tensor("maybe_mask_indptr", "d_mask_indptr", "int32", "unused", **_ONE),
    _UNUSED_SLOPES,
    *_FA2_SCALARS,
)
POD = _row(
    "pod", "pod_with_kv_cache_tensor", "", "pod_jit_binding.cu",
    "A request's prefill and a batch's decode in one launch.",
    *_of("p", *_POD_PREFILL), *_of("d", *_WORKSPACE), PlanInfo(), *_of("d", *_POD_DECODE), _PDL,
    same_strides=("paged_k_cache_d", "paged_v_cache_d"), offset_limit=_FAR,
    requires=(*_HEADS, "qo_len >= 1", "kv_len >= 1", "b >= 1"),
)  # fmt: skip

# The same of a batch of prefills, over pages as well.
_QUERIES_P, _CACHE_P = "nnz_p num_qo_heads head_dim", "num_pages_p page_size num_kv_heads head_dim"
_BATCH_POD_PREFILL = (
    Tensor("q", _QUERIES_P, "Q", "the prefills' queries"),
    replace(_PAGED_K, axes=_CACHE_P, kv=False),
    replace(_PAGED_V, axes=_CACHE_P, kv=False),
    _index("qo_indptr", "b_p+1", "where each prefill's queries start"),
    _index("paged_kv_indptr", "b_p+1", "where each prefill's pages start"),
    _index("paged_kv_indices", "num_indices_p", "the prefills' pages"),
    _index("paged_kv_last_page_len", "b_p", "tokens in each prefill's last page"),
    replace(_OUT_FA2, axes=_QUERIES_P, doc="their outputs"),
    replace(_LSE, axes="nnz_p num_qo_heads"),
    _MASK_MODE,
    _LAYOUT,
    _WINDOW,
    Tensor("maybe_custom_mask", "p_mask_bytes", "uint8", "not read", **_ONE),
    Tensor("maybe_mask_indptr", "p_mask_indptr", "int32", "not read", **_ONE),
    _UNUSED_SLOPES,
    *_FA2_SCALARS,
)
BATCH_POD = _row(
    "batch_pod", "batch_pod_with_kv_cache_tensor", "", "batch_pod_jit_binding.cu",
    "A batch's prefills and another's decode in one launch.",
    *_of("p", *_WORKSPACE), IntArray("plan_info_vec_p"), *_of("p", *_BATCH_POD_PREFILL),
    *_of("d", *_WORKSPACE), PlanInfo(name="plan_info_vec_d"), *_of("d", *_POD_DECODE), _PDL,
    Tensor("sm_aware_sched", "num_counters", "int32", "counters of blocks: set to zero first",
           writes=True, reads=False, contiguous=True),
    same_strides=("paged_k_cache_d", "paged_v_cache_d"), offset_limit=_FAR,
    requires=(*_HEADS, "nnz_p >= 1", "b >= 1"),
)  # fmt: skip

ROWS = tuple(FORMS)
