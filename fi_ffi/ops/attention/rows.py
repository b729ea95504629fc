"""The entries of FlashInfer's attention modules, argument by argument: decode, prefill and MLA.

A family's modules differ in what they were compiled for, and their names say it
(`fi_ffi.loader.uris`); their entries are the same.  fa3 is for SM90, and has another row,
as has its fp8 form.  The arguments after `enable_pdl` are those that
`flashinfer/jit/attention/modules.py` adds to the binding's.

The names here are of the first form of each row; `FORMS` has the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.releases import OLDEST, forms_of
from fi_ffi.ops.call.row import Arg, KvLayout, PlanInfo, Row, Scalar, Tensor, Vector

F16 = ("float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
# Keys and values of 4 bits (NVFP4): two e2m1 numbers in a byte, the first in its lower half, and a
# scale in e4m3 for every 16 of a head.  The dtypes that their tensors may have.
FP4 = ("uint8", "float4_e2m1fn_x2")
_SCALES = ("float8_e4m3fn", "uint8")
_FP4_BLOCK = 16
# Releases in which fa2's planner is told that all requests have as many queries.
UNIFORM = ">=0.6.16"
# Query heads for each key head that decode kernels were compiled for, and in which releases.
DECODE_GROUPS = {1: "", 2: "", 3: "", 4: "", 6: ">=0.6.18", 8: "", 16: ">=0.7.1"}
# The forms of each row, by the first; the packages above add their own.
FORMS: dict[Row, tuple[Row, ...]] = {}

HEADS = tuple(f"{size} >= 1" for size in ("num_qo_heads", "num_kv_heads", "page_size"))
HEADS += ("num_qo_heads % num_kv_heads == 0",)
FAR = 2**63  # caches are addressed in 64 bits
_Dtypes = dict[str, tuple[str, ...]]


def add_row(
    name: str,
    variant: str,
    doc: str,
    args: tuple[Arg, ...],
    later: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Row:
    """Add a row, named by family and symbol, with what most entries have in common; return its
    first form."""
    family, _, symbol = name.partition(".")
    source = family.removesuffix("_with_attention_sink") + "_sm90" * ("fa3" in variant)
    source += "_binding.cu" if family == "batch_mla" else "_jit_binding.cu"
    common: dict[str, Any] = {
        "source": f"csrc/{source}",
        "releases": f">={OLDEST}",
        "dtypes": {"Q": F16, "KV": F16 + FP8, "O": F16},
        "requires": HEADS,
        "vector": Vector(("head_dim_qk", "head_dim_vo")),
        "offset_limit": 2**31,
    }
    row = Row(name, family, symbol, doc=doc, args=args, variant=variant, **common | fields)
    forms = forms_of(row, later)
    FORMS[forms[0]] = forms
    return forms[0]


def index(name: str, axes: str, doc: str) -> Tensor:
    """An array of positions or pages."""
    return Tensor(name, axes, "int32", doc, contiguous=True)


def _maybe(name: str, axes: str, dtype: str, doc: str, since: str = "") -> Tensor:
    return Tensor(
        name, axes, dtype, doc, as_object=True, optional=True, contiguous=True, since=since
    )


def number(
    name: str,
    doc: str,
    type_: type[int] | type[float] | type[bool] = float,
    neutral: float | None = None,
    since: str = "",
) -> Scalar:
    """A number; `neutral` stands for an option that the caller leaves out."""
    return Scalar(name, type_, neutral, doc, since=since)


# Arguments by name. Where an entry's own differs, its row has that.
_SHARED: tuple[Arg, ...] = (
    Tensor("float_workspace_buffer", "float_bytes", "uint8", "partial results", writes=True),
    Tensor("int_workspace_buffer", "int_bytes", "uint8", "the schedule", writes=True),
    Tensor("page_locked_int_workspace_buffer", "int_bytes", "uint8",
           "the schedule, before its copy to the device", writes=True, host=True),
    PlanInfo(),
    Tensor("empty_q_data", "0", "uint8", "of the query's dtype"),
    Tensor("empty_kv_data", "0", "uint8", "of the cache's dtype"),
    Tensor("q", "nnz_qo num_qo_heads head_dim_qk", "Q", "queries"),
    Tensor("k", "nnz_kv num_kv_heads head_dim_qk", "KV", "keys", kv=True),
    Tensor("v", "nnz_kv num_kv_heads head_dim_vo", "KV", "values", kv=True),
    Tensor("tmp", "tmp_bytes", "uint8", "partial results", writes=True),
    # fa2's kernels work the output's strides out themselves.
    Tensor("o", "nnz_qo num_qo_heads head_dim_vo", "O", "the output", writes=True, reads=False,
           contiguous=True),
    Tensor("maybe_lse", "nnz_qo num_qo_heads", "float32",
           "receives each row's log-sum-exp, base 2", optional=True, contiguous=True, writes=True,
           reads=False),
    Tensor("paged_k_cache", "num_pages page_size num_kv_heads head_dim_qk", "KV",
           "the keys' pages", kv=True, offset_limit=FAR, stride_limit=2**32),
    Tensor("paged_v_cache", "num_pages page_size num_kv_heads head_dim_vo", "KV",
           "the values' pages", kv=True, offset_limit=FAR, stride_limit=2**32),
    index("qo_indptr", "b+1", "start of each request's queries"),
    index("kv_indptr", "b+1", "start of each request's keys, or of its pages"),
    index("indptr", "b+1", "start of each request's pages"),
    index("kv_len_arr", "b", "tokens in each request"),
    index("kv_len", "b", "tokens in each request"),
    index("paged_kv_indptr", "b+1", "start of each request's pages"),
    index("paged_kv_indices", "num_indices", "the pages"),
    index("paged_kv_last_page_len", "b", "tokens in each request's last page"),
    index("kv_indices", "num_indices", "the pages"),
    number("mask_mode_code", "0 none, 1 causal, 2 custom, 3 multi-item scoring", int),
    KvLayout(),
    number("window_left", "visible tokens to the left; -1: all", int),
    number("enable_pdl", "programmatic dependent launch", bool, False),
    number("causal", "True: each query sees the tokens up to its own", bool),
    number("total_num_rows", "queries in all", int),
    number("batch_size", "requests", int),
    number("num_heads", "heads of the queries", int),
    number("num_qo_heads", "heads of the queries", int),
    number("num_kv_heads", "heads of keys and values", int),
    number("page_size", "tokens in a page", int),
    number("enable_cuda_graph", "same launch for other lengths", bool),
    number("head_dim_qk", "of queries and keys", int),
    number("head_dim_vo", "of values and output", int),
    number("head_dim_o", "of the output", int),
    number("fixed_split_size", "pages in each piece of a split request; -1: any", int),
    number("disable_split_kv", "True: never split requests", bool),
    number("num_colocated_ctas", "thread blocks reserved for another kernel", int),
    number("uniform_q_len", "queries of every request, with CUDA graphs; 0: any", int,
           since="0.6.16"),
    # What modules.py adds, by kernel.
    _maybe("maybe_custom_mask", "mask_bytes", "uint8", "the packed mask"),
    _maybe("maybe_mask_indptr", "b+1", "int32", "start of each request's mask"),
    _maybe("maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes"),
    _maybe("maybe_prefix_len_ptr", "b", "uint32", "tokens in each request's prefix"),
    _maybe("maybe_token_pos_in_items_ptr", "num_positions", "uint16",
           "each token's position in its item"),
    _maybe("maybe_max_item_len_ptr", "b", "uint16", "tokens in each request's longest item"),
    number("token_pos_in_items_len", "positions for each request", int, 0),
    _maybe("maybe_k_cache_sf", "num_k_sf", "uint8", "block scales of NVFP4 keys", "0.6.10"),
    _maybe("maybe_v_cache_sf", "num_v_sf", "uint8", "block scales of NVFP4 values", "0.6.10"),
    _maybe("maybe_scale_q", "num_qo_heads", "float32", "scale of each head of q"),
    _maybe("maybe_scale_k", "num_kv_heads", "float32", "scale of each head of k"),
    _maybe("maybe_scale_v", "num_kv_heads", "float32", "scale of each head of v"),
    replace(_maybe("sink", "num_qo_heads", "float32",
                   "a logit of each head that joins the softmax's sum"), optional=False),
    number("logits_soft_cap", "cap of the logits, `cap * tanh(logits / cap)`; 0: none", float, 0.0),
    number("sm_scale", "factor of q @ k"),
    number("rope_rcp_scale", "1 / rope_scale", float, 1.0),
    number("rope_rcp_theta", "1 / rope_theta", float, 1e-4),
    number("scale_q_scalar", "scale of q", float, 1.0),
    number("scale_k_scalar", "scale of k", float, 1.0),
    number("scale_v_scalar", "scale of v", float, 1.0),
    # MLA's.
    Tensor("q_nope", "nnz_qo num_heads head_dim_ckv", "Q", "queries, absorbed"),
    Tensor("q_pe", "nnz_qo num_heads head_dim_kpe", "Q", "queries' part with the encoding"),
    number("return_lse_base_on_e", "True: natural logarithms; False: base 2", bool),
    number("ckv_scale", "scale of an fp8 cache's compressed keys and values", float, 1.0,
           since="0.6.14"),
    number("kpe_scale", "scale of an fp8 cache's part with the encoding", float, 1.0,
           since="0.6.14"),
    Tensor("maybe_ckv_scale_arr", "num_pages page_size head_dim_ckv/128", "float32",
           "scales of an fp8 cache", optional=True, contiguous=True, in_vectors=False,
           offset_limit=2**32, since="0.6.18"),
)  # fmt: skip
SHARED: Mapping[str, Any] = {arg.name: arg for arg in _SHARED}


def arguments(names: str, *own: Arg) -> tuple[Arg, ...]:
    """List arguments by name: the entry's own, or those of several entries."""
    args: list[Arg] = []
    for name in names.split():
        args += [arg for arg in own if arg.name == name] or [SHARED[name]]
    return tuple(args)


def in_4_bits(k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """The keys and values with 4 bits an element, and the scales of their blocks, which lie where
    those lie that they scale."""
    for of, tensor, what in (("k", k, "keys"), ("v", v, "values")):
        yield replace(tensor, axes=f"{tensor.axes}/2", alignment=8, in_vectors=False)
        yield replace(
            SHARED[f"maybe_{of}_cache_sf"],
            axes=f"{tensor.axes}/{_FP4_BLOCK}",
            dtype="SF",
            doc=f"block scales of the {what}",
            contiguous=False,
            kv=True,
            alignment=4,
            in_vectors=False,
            offset_limit=FAR,
        )


WORKSPACES = "float_workspace_buffer int_workspace_buffer"
PAGES = "paged_kv_indptr paged_kv_indices paged_kv_last_page_len"
FA2_SCALARS = "logits_soft_cap sm_scale rope_rcp_scale rope_rcp_theta"
PAIR = ("paged_k_cache", "paged_v_cache")
_RUN = f"{WORKSPACES} plan_info_vec"
MULTI_ITEM = "maybe_prefix_len_ptr maybe_token_pos_in_items_ptr maybe_max_item_len_ptr"
OF_FP8 = "maybe_scale_q maybe_scale_k maybe_scale_v sm_scale "
OF_FP8 += "scale_q_scalar scale_k_scalar scale_v_scalar"
BLOCK_SCALES = "maybe_k_cache_sf maybe_v_cache_sf"
# What modules.py adds to a batch's prefill, by kernel.
_OF_BATCH = {
    "fa2": f"maybe_custom_mask maybe_mask_indptr maybe_alibi_slopes {MULTI_ITEM} "
    f"{BLOCK_SCALES} {FA2_SCALARS} token_pos_in_items_len",
    "fa3": f"{MULTI_ITEM} maybe_scale_v logits_soft_cap sm_scale scale_v_scalar "
    "token_pos_in_items_len",
    "fa3_fp8": OF_FP8,
}
_SAME: _Dtypes = {"Q": F16, "KV": F16, "O": F16}
IN_4_BITS: dict[str, Any] = {
    "dtypes": {"Q": F16, "KV": FP4, "O": F16, "SF": _SCALES},
    "releases": ">=0.6.10",
    "requires": (*HEADS, "head_dim_qk % 64 == 0", "head_dim_vo % 64 == 0"),
}
PREFILL_DTYPES: dict[str, _Dtypes] = {
    "fa2": {"Q": F16, "KV": F16 + FP8, "O": F16},
    "fa3": _SAME,
    "fa3_fp8": {"Q": FP8, "KV": FP8, "O": F16},
}
# Decode kernels store each element of their outputs alone, those of pieces too, and so in fp8.
DECODE_DTYPES: _Dtypes = {"Q": F16, "KV": F16 + FP8, "O": F16 + FP8}


def output(kind: str) -> Tensor:
    """The output of a prefill kernel."""
    o: Tensor = SHARED["o"]
    return o if kind.startswith("fa2") else replace(o, contiguous=False)


def add_plan(family: str, variant: str, names: str, **more: Any) -> Row:
    """Add the row of a planner: workspaces, then host arrays and numbers."""
    args = list(arguments(f"{WORKSPACES} page_locked_int_workspace_buffer"))
    for arg in arguments(names):
        args.append(replace(arg, host=True) if isinstance(arg, Tensor) else arg)
    fields: dict[str, Any] = {"dtypes": {}, "vector": Vector(()), "result": "Array<int>"}
    return add_row(f"{family}.plan", variant, "Schedule a batch.", tuple(args), **fields, **more)


BATCH_DECODE_PLAN = add_plan(
    "batch_decode",
    "",
    "indptr batch_size num_qo_heads num_kv_heads page_size enable_cuda_graph window_left "
    "logits_soft_cap head_dim_qk head_dim_vo empty_q_data empty_kv_data",
)
BATCH_DECODE_RUN = add_row(
    "batch_decode.run",
    "",
    "Attention of a query a request.",
    arguments(
        f"{_RUN} q {' '.join(PAIR)} {PAGES} o maybe_lse kv_layout window_left enable_pdl "
        f"maybe_alibi_slopes {FA2_SCALARS}",
        replace(SHARED["q"], axes="b num_qo_heads head_dim_qk"),
        replace(SHARED["o"], axes="b num_qo_heads head_dim_vo"),
        replace(SHARED["maybe_lse"], axes="b num_qo_heads"),
    ),
    same_strides=PAIR,
    nothing_axis="b",
    dtypes=DECODE_DTYPES,
)

_FA3_PLAN = "qo_indptr kv_indptr kv_len_arr total_num_rows batch_size num_qo_heads num_kv_heads "
_FA3_PLAN += "page_size enable_cuda_graph head_dim_qk head_dim_vo causal window_left"
_FA2_PLAN = f"{_FA3_PLAN} fixed_split_size disable_split_kv num_colocated_ctas uniform_q_len"


def variant_of(kind: str) -> str:
    """The suffix of the rows of a kernel and a kind of dtypes; fa2's plain ones have none."""
    return f"_{kind}".removeprefix("_fa2")


def _prefill_runs(
    family: str, kind: str, variant: str, added: str, **fields: Any
) -> tuple[Row, Row]:
    """Add a batch-prefill family's ragged_run and paged_run."""
    fields |= {"nothing_axis": "nnz_qo"}
    tail = f"o maybe_lse mask_mode_code kv_layout window_left enable_pdl {added}"
    is_fp4 = kind == "fa2_fp4"

    def add(symbol: str, k: str, v: str, positions: str, where: str, **more: Any) -> Row:
        own = in_4_bits(SHARED[k], SHARED[v]) if is_fp4 else ()
        args = arguments(f"{_RUN} q {k} {v} {positions} {tail}", output(kind), *own)
        doc = f"Attention over keys and values{' of 4 bits' * is_fp4}{where}."
        return add_row(f"{family}.{symbol}", variant, doc, args, **more, **fields)

    pages = f"qo_indptr {PAGES}", ", in a paged cache"
    return (
        add("ragged_run", "k", "v", "qo_indptr kv_indptr", ", side by side"),
        add("paged_run", *PAIR, *pages, same_strides=PAIR),
    )


def _prefill(family: str, kind: str, variant: str, added: str, dtypes: _Dtypes) -> tuple[Row, ...]:
    plan = add_plan(family, variant, _FA2_PLAN if kind == "fa2" else _FA3_PLAN)
    return plan, *_prefill_runs(family, kind, variant, added, dtypes=dtypes)


# Of each kernel: plan, ragged_run, paged_run.
BATCH_PREFILL = {
    kind: _prefill("batch_prefill", kind, variant_of(kind), added, PREFILL_DTYPES[kind])
    for kind, added in _OF_BATCH.items()
}
BATCH_PREFILL["fa2_fp4"] = (
    BATCH_PREFILL["fa2"][0],
    *_prefill_runs("batch_prefill", "fa2_fp4", "_fp4", _OF_BATCH["fa2"], **IN_4_BITS),
)
_SINK = "batch_prefill_with_attention_sink"
BATCH_PREFILL_SINK = {
    kind: _prefill(_SINK, kind, f"_sink{variant_of(kind)}", "sink sm_scale", _SAME)
    for kind in ("fa2", "fa3")
}

# Multi-head latent attention over a paged cache.  From 0.7.0 on the planner leaves the copy to
# the device to its caller, and returns how many bytes that is, after the plan's info.
WITH_COPY = "Tuple<Array<int>, int>"
# Before, a page's place was computed in 32 bits, and the tile before the first was loaded for
# a request without keys.
_SOUND = "0.6.11"
# Releases whose kernels take a cache of float8_e4m3fn, with bfloat16 queries.
MLA_FP8 = {"fa2": ">=0.6.18", "fa3": ">=0.6.14"}


def _caches(**more: Any) -> Iterator[Tensor]:
    docs = {"ckv": "compressed keys and values", "kpe": "keys' part with the encoding"}
    for part, doc in docs.items():
        axes = f"num_pages page_size head_dim_{part}"
        yield Tensor(f"{part}_cache", axes, "KV", doc, stride_limit=2**32, **more)


_MLA_RUN = f"{_RUN} q_nope q_pe ckv_cache kpe_cache kv_indices o maybe_lse mask_mode_code num_heads"
_MLA_RUN += " page_size sm_scale return_lse_base_on_e ckv_scale kpe_scale maybe_ckv_scale_arr"
_MLA_ARGS = (
    *_caches(offset_limit=2**32, until=_SOUND),
    *_caches(offset_limit=FAR, since=_SOUND),
    replace(SHARED["o"], axes="nnz_qo num_heads head_dim_ckv", dtype="Q", contiguous=False),
    replace(SHARED["maybe_lse"], axes="nnz_qo num_heads", doc="receives each row's log-sum-exp"),
)
_MLA_SIZES = ("head_dim_ckv in (512,)", "head_dim_kpe in (64,)")
_MLA: dict[str, Any] = {
    "vector": Vector(("head_dim_ckv", "head_dim_kpe")),
    "nothing_axis": "nnz_qo",
    "requires": ("num_heads >= 1", "page_size >= 1", *_MLA_SIZES),
}


def _mla_run(variant: str, **fields: Any) -> Row:
    doc, args = "Multi-head latent attention over a paged cache.", arguments(_MLA_RUN, *_MLA_ARGS)
    return add_row("batch_mla.run", variant, doc, args, **_MLA, **fields)


def _mla(kind: str) -> tuple[Row, Row]:
    names, later = "qo_indptr kv_indptr kv_len num_heads head_dim_o causal", {"result": WITH_COPY}
    plan = add_plan("batch_mla", variant_of(kind), names, later={"0.7.0": later})
    return plan, _mla_run(variant_of(kind), dtypes={"Q": F16, "KV": F16})


# Of each kernel: plan, run.
BATCH_MLA = {kind: _mla(kind) for kind in MLA_FP8}
_FP8_CACHE: _Dtypes = {"Q": ("bfloat16",), "KV": ("float8_e4m3fn",)}
for _kind, _since in MLA_FP8.items():
    _run = _mla_run(f"_{_kind}_fp8", dtypes=_FP8_CACHE, releases=_since)
    BATCH_MLA[f"{_kind}_fp8"] = BATCH_MLA[_kind][0], _run
# Runs whose every request needs a key.
NEED_KEYS = frozenset(
    form
    for _, run in BATCH_MLA.values()
    for form in FORMS[run]
    if form.releases.endswith(f"<{_SOUND}")
)

ROWS = tuple(FORMS)
