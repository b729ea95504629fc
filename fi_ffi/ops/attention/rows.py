"""The entries of FlashInfer's attention modules, argument by argument.

A family's modules differ in what they were compiled for, and their names say it
(`fi_ffi.loader.uris`); their entries are the same.  fa3 is for SM90, and has another row,
as has its fp8 form.  The arguments after `enable_pdl` are those that
`flashinfer/jit/attention/modules.py` adds to the binding's.
"""

from __future__ import annotations

from fi_ffi.ops.row import Arg, KvLayout, PlanInfo, Row, Scalar, Tensor, Vector

F16 = ("float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
_DTYPES = {"Q": F16, "KV": F16 + FP8, "O": F16}
_DTYPES_FP8 = {"Q": FP8, "KV": FP8, "O": F16}
_SAME = {"Q": F16, "KV": F16, "O": F16}

_VECTOR = Vector(("head_dim_qk", "head_dim_vo"))
_HEADS = (("num_kv_heads", "num_qo_heads"),)
_AT_LEAST = {"num_qo_heads": 1, "num_kv_heads": 1, "page_size": 1}
_WRITTEN = {"writes": True, "reads": False}
_CACHE = {"dtype": "KV", "kv": True, "offset_limit": 2**63}


def _index(name: str, axes: str, doc: str, host: bool = False) -> Tensor:
    return Tensor(name, axes, "int32", doc, contiguous=True, host=host)


def _maybe(name: str, axes: str, dtype: str, doc: str) -> Tensor:
    return Tensor(name, axes, dtype, doc, as_object=True, optional=True, contiguous=True)


def _number(name: str, doc: str, type_: type[int] | type[float] | type[bool] = float) -> Scalar:
    return Scalar(name, type_, None, doc)


_WORKSPACE = (
    Tensor("float_workspace_buffer", "float_bytes", "uint8", "partial results", writes=True),
    Tensor("int_workspace_buffer", "int_bytes", "uint8", "the schedule", writes=True),
)
_STAGING = Tensor(
    "page_locked_int_workspace_buffer", "int_bytes", "uint8", "the schedule, on its way",
    writes=True, host=True,
)  # fmt: skip
_Q = Tensor("q", "nnz_qo num_qo_heads head_dim_qk", "Q", "queries")
_O = Tensor("o", "nnz_qo num_qo_heads head_dim_vo", "O", "the output", **_WRITTEN)  # type: ignore[arg-type]
_LSE = Tensor(
    "maybe_lse", "nnz_qo num_qo_heads", "float32",
    "gets the logarithm to base 2 of each row's sum of exponentials",
    optional=True, contiguous=True, **_WRITTEN,  # type: ignore[arg-type]
)  # fmt: skip
_K = Tensor("k", "nnz_kv num_kv_heads head_dim_qk", "KV", "keys", kv=True)
_V = Tensor("v", "nnz_kv num_kv_heads head_dim_vo", "KV", "values", kv=True)
_PAGED_K = Tensor("paged_k_cache", "num_pages page_size num_kv_heads head_dim_qk",
                  doc="the keys' pages", **_CACHE)  # type: ignore[arg-type]
_PAGED_V = Tensor("paged_v_cache", "num_pages page_size num_kv_heads head_dim_vo",
                  doc="the values' pages", **_CACHE)  # type: ignore[arg-type]
_PAGES = (
    _index("paged_kv_indptr", "b+1", "where each request's pages start"),
    _index("paged_kv_indices", "num_indices", "the pages"),
    _index("paged_kv_last_page_len", "b", "tokens in each request's last page"),
)
_MASK_MODE = _number("mask_mode_code", "0 none, 1 causal, 2 custom, 3 multi-item scoring", int)
_WINDOW = _number("window_left", "tokens to the left that are seen; -1: all", int)
_PDL = _number("enable_pdl", "programmatic dependent launch", bool)

_SLOPES = _maybe("maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes")
_SOFT_CAP = _number("logits_soft_cap", "logits become cap * tanh(logits / cap); 0: not")
_SM_SCALE = _number("sm_scale", "what q @ k is multiplied by")
_ROPE = (
    _number("rope_rcp_scale", "1 / rope_scale"),
    _number("rope_rcp_theta", "1 / rope_theta"),
)
_MULTI_ITEM = (
    _maybe("maybe_prefix_len_ptr", "b", "uint32", "tokens of each request's prefix"),
    _maybe("maybe_token_pos_in_items_ptr", "num_positions", "uint16", "each token's place in its item"),
    _maybe("maybe_max_item_len_ptr", "b", "uint16", "tokens of each request's longest item"),
)
_ITEMS_LEN = _number("token_pos_in_items_len", "positions for each request", int)
_BLOCK_SCALES = (
    _maybe("maybe_k_cache_sf", "num_k_sf", "uint8", "block scales of NVFP4 keys"),
    _maybe("maybe_v_cache_sf", "num_v_sf", "uint8", "block scales of NVFP4 values"),
)


def _scale(of: str, heads: str) -> Tensor:
    return _maybe(f"maybe_scale_{of}", heads, "float32", f"scale of each head of {of}")


_SCALE_V = _scale("v", "num_kv_heads")
_SCALES = (_scale("q", "num_qo_heads"), _scale("k", "num_kv_heads"), _SCALE_V)
_SCALARS = tuple(_number(f"scale_{of}_scalar", f"scale of {of}") for of in "qkv")

# What modules.py adds, by kernel.  ``mask`` is the one argument that single and batch differ in.
_MASK = _maybe("maybe_custom_mask", "mask_bytes", "uint8", "the packed mask")
_MASK_INDPTR = _maybe("maybe_mask_indptr", "b+1", "int32", "where each request's mask starts")
_FA2_SCALARS = (_SOFT_CAP, _SM_SCALE, *_ROPE)
_DECODE = (_SLOPES, *_FA2_SCALARS)
_SINGLE = {
    "fa2": (_MASK, _SLOPES, *_BLOCK_SCALES, *_FA2_SCALARS),
    "fa3": (_SCALE_V, _SOFT_CAP, _SM_SCALE, _SCALARS[2]),
    "fa3_fp8": (*_SCALES, _SM_SCALE, *_SCALARS),
}
_BATCH = {
    "fa2": (_MASK, _MASK_INDPTR, _SLOPES, *_MULTI_ITEM, *_BLOCK_SCALES, *_FA2_SCALARS, _ITEMS_LEN),
    "fa3": (*_MULTI_ITEM, _SCALE_V, _SOFT_CAP, _SM_SCALE, _SCALARS[2], _ITEMS_LEN),
    "fa3_fp8": (*_SCALES, _SM_SCALE, *_SCALARS),
}
_SINK = (
    Tensor("sink", "num_qo_heads", "float32", "a logit of each head that takes part in the sum",
           as_object=True, contiguous=True),
    _SM_SCALE,
)
_KV_OF = {"fa2": _DTYPES, "fa3": _SAME, "fa3_fp8": _DTYPES_FP8}


def _row(family: str, symbol: str, variant: str, source: str, doc: str, *args: Arg,
         **fields: object) -> Row:  # fmt: skip
    more = {
        "releases": ">=0.6.10,<0.6.18", "dtypes": _DTYPES, "vector": _VECTOR, "divides": _HEADS,
        "min_sizes": _AT_LEAST, "offset_limit": 2**31,
    } | fields  # fmt: skip
    name = f"{family}.{symbol}"
    return Row(name, family, symbol, f"csrc/{source}", doc, args, variant=variant, **more)  # type: ignore[arg-type]


def _plan(family: str, variant: str, source: str, *args: Arg) -> Row:
    return _row(
        family, "plan", variant, source, "Schedule a batch.", *_WORKSPACE, _STAGING, *args,
        dtypes={}, vector=Vector(()), result="Array<int>",
    )  # fmt: skip


_SIZES = (
    _number("total_num_rows", "queries in all", int),
    _number("batch_size", "requests", int),
    _number("num_qo_heads", "heads of the queries", int),
    _number("num_kv_heads", "heads of keys and values", int),
    _number("page_size", "tokens in a page", int),
    _number("enable_cuda_graph", "keep the launch the same for other lengths", bool),
)
_HEAD_DIMS = (
    _number("head_dim_qk", "of queries and keys", int),
    _number("head_dim_vo", "of values and output", int),
)
_CAUSAL = _number("causal", "whether each query sees the tokens up to its own", bool)
_FA3_PLAN = (
    _index("qo_indptr", "b+1", "where each request's queries start", host=True),
    _index("kv_indptr", "b+1", "where each request's pages (or tokens) start", host=True),
    _index("kv_len_arr", "b", "tokens of each request", host=True),
    *_SIZES, *_HEAD_DIMS, _CAUSAL, _WINDOW,
)  # fmt: skip
_FA2_PLAN = (
    *_FA3_PLAN,
    _number("fixed_split_size", "pages of each piece that a request is split in; -1: any", int),
    _number("disable_split_kv", "whether requests are never split", bool),
    _number("num_colocated_ctas", "blocks that another kernel takes", int),
)


def _batch(family: str, variant: str, dtypes: dict[str, tuple[str, ...]], *args: Arg) -> tuple[Row, ...]:
    """The rows of a batch-prefill family: plan, ragged_run, paged_run."""
    name = "batch_prefill" if variant in ("", "_sink") else "batch_prefill_sm90"
    source = "batch_prefill_fp8_sm90.cu" if "fp8" in variant else f"{name}_jit_binding.cu"
    tail = (_O, _LSE, _MASK_MODE, KvLayout(), _WINDOW, _PDL, *args)
    return (
        _plan(family, variant, source, *(_FA2_PLAN if name == "batch_prefill" else _FA3_PLAN)),
        _row(
            family, "ragged_run", variant, source, "Attention over keys and values side by side.",
            *_WORKSPACE, PlanInfo(), _Q, _K, _V,
            _index("qo_indptr", "b+1", "where each request's queries start"),
            _index("kv_indptr", "b+1", "where each request's keys start"),
            *tail, dtypes=dtypes,
        ),
        _row(
            family, "paged_run", variant, source, "Attention over a paged cache.",
            *_WORKSPACE, PlanInfo(), _Q, _PAGED_K, _PAGED_V,
            _index("qo_indptr", "b+1", "where each request's queries start"), *_PAGES,
            *tail, dtypes=dtypes, same_strides=("paged_k_cache", "paged_v_cache"),
        ),
    )  # fmt: skip


def _single(variant: str, dtypes: dict[str, tuple[str, ...]], *args: Arg) -> Row:
    source = f"single_prefill{'_sm90' if variant else ''}_jit_binding.cu"
    return _row(
        "single_prefill", "run", variant, source, "Attention of one request.", _Q, _K, _V,
        Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True),
        _O, _LSE, _MASK_MODE, KvLayout(), _WINDOW, *args, dtypes=dtypes,
    )  # fmt: skip


_DECODE_Q = Tensor("q", "num_qo_heads head_dim_qk", "Q", "the query", contiguous=True)
_CONTIGUOUS = {"dtype": "KV", "kv": True, "contiguous": True}
# What a decode kernel without tensor cores was compiled for.
DECODE_GROUPS = (1, 2, 3, 4, 8)

SINGLE_DECODE = _row(
    "single_decode", "run", "", "single_decode_jit_binding.cu", "Attention of one query.",
    _DECODE_Q,
    Tensor("k", "nnz_kv num_kv_heads head_dim_qk", doc="keys", **_CONTIGUOUS),  # type: ignore[arg-type]
    Tensor("v", "nnz_kv num_kv_heads head_dim_qk", doc="values", **_CONTIGUOUS),  # type: ignore[arg-type]
    Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True),
    Tensor("o", "num_qo_heads head_dim_qk", "O", "the output", contiguous=True, **_WRITTEN),  # type: ignore[arg-type]
    Tensor("maybe_lse", "num_qo_heads", "float32", _LSE.doc, optional=True, contiguous=True, **_WRITTEN),  # type: ignore[arg-type]
    KvLayout(strided=False), _WINDOW, *_DECODE,
)  # fmt: skip

BATCH_DECODE_PLAN = _plan(
    "batch_decode", "", "batch_decode_jit_binding.cu",
    _index("indptr", "b+1", "where each request's pages start", host=True),
    *_SIZES[1:], _WINDOW, _SOFT_CAP, *_HEAD_DIMS,
    Tensor("empty_q_data", "0", "uint8", "of the query's dtype", host=True),
    Tensor("empty_kv_data", "0", "uint8", "of the cache's dtype", host=True),
)  # fmt: skip
BATCH_DECODE_RUN = _row(
    "batch_decode", "run", "", "batch_decode_jit_binding.cu", "Attention of a query a request.",
    *_WORKSPACE, PlanInfo(),
    Tensor("q", "b num_qo_heads head_dim_qk", "Q", "queries"), _PAGED_K, _PAGED_V, *_PAGES,
    Tensor("o", "b num_qo_heads head_dim_vo", "O", "the output", contiguous=True, **_WRITTEN),  # type: ignore[arg-type]
    Tensor("maybe_lse", "b num_qo_heads", "float32", _LSE.doc, optional=True, contiguous=True, **_WRITTEN),  # type: ignore[arg-type]
    KvLayout(), _WINDOW, _PDL, *_DECODE, same_strides=("paged_k_cache", "paged_v_cache"),
)  # fmt: skip

_MLA_VECTOR = Vector(("head_dim_ckv", "head_dim_kpe"))


def _mla(variant: str) -> tuple[Row, Row]:
    source = f"batch_mla{'_sm90' if variant else ''}_binding.cu"
    plan = _plan(
        "batch_mla", variant, source,
        _index("qo_indptr", "b+1", "where each request's queries start", host=True),
        _index("kv_indptr", "b+1", "where each request's pages start", host=True),
        _index("kv_len", "b", "tokens of each request", host=True),
        _number("num_heads", "heads of the queries", int),
        _number("head_dim_o", "of the output", int), _CAUSAL,
    )  # fmt: skip
    run = _row(
        "batch_mla", "run", variant, source, "Multi-head latent attention over a paged cache.",
        *_WORKSPACE, PlanInfo(),
        Tensor("q_nope", "nnz_qo num_heads head_dim_ckv", "Q", "queries, absorbed"),
        Tensor("q_pe", "nnz_qo num_heads head_dim_kpe", "Q", "queries' part with the encoding"),
        Tensor("ckv_cache", "num_pages page_size head_dim_ckv", "KV", "compressed keys and values",
               offset_limit=2**63),
        Tensor("kpe_cache", "num_pages page_size head_dim_kpe", "KV", "keys' part with the encoding",
               offset_limit=2**63),
        _index("kv_indices", "num_indices", "the pages"),
        Tensor("o", "nnz_qo num_heads head_dim_ckv", "Q", "the output", **_WRITTEN),  # type: ignore[arg-type]
        Tensor("maybe_lse", "nnz_qo num_heads", "float32", "gets the log-sum-exp of each row",
               optional=True, contiguous=True, **_WRITTEN),  # type: ignore[arg-type]
        _MASK_MODE,
        _number("num_heads", "heads of the queries", int),
        _number("page_size", "tokens in a page", int),
        _SM_SCALE,
        _number("return_lse_base_on_e", "natural logarithms, not those to base 2", bool),
        dtypes={"Q": F16, "KV": F16}, vector=_MLA_VECTOR, divides=(),
        min_sizes={"num_heads": 1, "page_size": 1},
        sizes_in={"head_dim_ckv": (512,), "head_dim_kpe": (64,)},
    )  # fmt: skip
    return plan, run


SINGLE_PREFILL = {name: _single("" if name == "fa2" else f"_{name}", _KV_OF[name], *args)
                  for name, args in _SINGLE.items()}  # fmt: skip
BATCH_PREFILL = {
    name: _batch("batch_prefill", "" if name == "fa2" else f"_{name}", _KV_OF[name], *args)
    for name, args in _BATCH.items()
}
BATCH_PREFILL_SINK = {
    backend: _batch("batch_prefill_with_attention_sink",
                    "_sink" if backend == "fa2" else "_sink_fa3", _SAME, *_SINK)
    for backend in ("fa2", "fa3")
}  # fmt: skip
BATCH_MLA = {"fa2": _mla(""), "fa3": _mla("_fa3")}

ROWS = (
    SINGLE_DECODE,
    *SINGLE_PREFILL.values(),
    BATCH_DECODE_PLAN,
    BATCH_DECODE_RUN,
    *(row for rows in BATCH_PREFILL.values() for row in rows),
    *(row for rows in BATCH_PREFILL_SINK.values() for row in rows),
    *(row for rows in BATCH_MLA.values() for row in rows),
)
