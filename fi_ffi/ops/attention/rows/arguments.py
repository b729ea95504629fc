"""Arguments that the attention entries share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.releases import OLDEST
from fi_ffi.ops.row import Arg, Row, Scalar, Tensor, Vector

Dtypes = dict[str, tuple[str, ...]]
F16 = ("float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")

HEADS = ("num_qo_heads >= 1", "num_kv_heads >= 1", "page_size >= 1",
         "num_qo_heads % num_kv_heads == 0")  # fmt: skip
FAR = 2**63  # caches are addressed in 64 bits


def index(name: str, axes: str, doc: str, host: bool = False) -> Tensor:
    return Tensor(name, axes, "int32", doc, contiguous=True, host=host)


def maybe(name: str, axes: str, dtype: str, doc: str, since: str = "") -> Tensor:
    return Tensor(
        name, axes, dtype, doc, as_object=True, optional=True, contiguous=True, since=since
    )


def number(
    name: str, doc: str, type_: type[int] | type[float] | type[bool] = float, since: str = ""
) -> Scalar:
    return Scalar(name, type_, None, doc, since=since)


WORKSPACE = (
    Tensor("float_workspace_buffer", "float_bytes", "uint8", "partial results", writes=True),
    Tensor("int_workspace_buffer", "int_bytes", "uint8", "the schedule", writes=True),
)
_STAGING = Tensor(
    "page_locked_int_workspace_buffer", "int_bytes", "uint8", "the schedule, on its way",
    writes=True, host=True,
)  # fmt: skip
OUT = Tensor("o", "nnz_qo num_qo_heads head_dim_vo", "O", "the output", writes=True, reads=False)
OUT_FA2 = replace(OUT, contiguous=True)  # fa2's kernels work its strides out themselves
LSE = Tensor(
    "maybe_lse", "nnz_qo num_qo_heads", "float32",
    "gets the logarithm to base 2 of each row's sum of exponentials",
    optional=True, contiguous=True, writes=True, reads=False,
)  # fmt: skip
PAGED_K = Tensor(
    "paged_k_cache", "num_pages page_size num_kv_heads head_dim_qk", "KV", "the keys' pages",
    kv=True, offset_limit=FAR, stride_limit=2**32,
)  # fmt: skip
PAGED_V = replace(
    PAGED_K, name="paged_v_cache", axes="num_pages page_size num_kv_heads head_dim_vo",
    doc="the values' pages",
)  # fmt: skip
PAIR = ("paged_k_cache", "paged_v_cache")
PAGES = (
    index("paged_kv_indptr", "b+1", "where each request's pages start"),
    index("paged_kv_indices", "num_indices", "the pages"),
    index("paged_kv_last_page_len", "b", "tokens in each request's last page"),
)
MASK_MODE = number("mask_mode_code", "0 none, 1 causal, 2 custom, 3 multi-item scoring", int)
WINDOW = number("window_left", "tokens to the left that are seen; -1: all", int)
PDL = number("enable_pdl", "programmatic dependent launch", bool)
CAUSAL = number("causal", "whether each query sees the tokens up to its own", bool)
SLOPES = maybe("maybe_alibi_slopes", "num_qo_heads", "float32", "ALiBi's slopes")
SOFT_CAP = number("logits_soft_cap", "logits become cap * tanh(logits / cap); 0: not")
SM_SCALE = number("sm_scale", "what q @ k is multiplied by")
FA2_SCALARS = (
    SOFT_CAP,
    SM_SCALE,
    number("rope_rcp_scale", "1 / rope_scale"),
    number("rope_rcp_theta", "1 / rope_theta"),
)

SIZES = (
    number("total_num_rows", "queries in all", int),
    number("batch_size", "requests", int),
    number("num_qo_heads", "heads of the queries", int),
    number("num_kv_heads", "heads of keys and values", int),
    number("page_size", "tokens in a page", int),
    number("enable_cuda_graph", "keep the launch the same for other lengths", bool),
)
HEAD_DIMS = (
    number("head_dim_qk", "of queries and keys", int),
    number("head_dim_vo", "of values and output", int),
)


def row(family: str, symbol: str, variant: str, source: str, doc: str, *args: Arg,
        **fields: Any) -> Row:  # fmt: skip
    """A row with what most entries have in common."""
    more: dict[str, Any] = {
        "releases": f">={OLDEST}", "dtypes": {"Q": F16, "KV": F16 + FP8, "O": F16},
        "requires": HEADS, "vector": Vector(("head_dim_qk", "head_dim_vo")),
        "offset_limit": 2**31,
    } | fields  # fmt: skip
    name = f"{family}.{symbol}"
    return Row(name, family, symbol, f"csrc/{source}", doc, args, variant=variant, **more)


def plan(family: str, variant: str, source: str, *args: Arg, **fields: Any) -> Row:
    """The row of a planner: workspaces, then host arrays and numbers."""
    return row(
        family, "plan", variant, source, "Schedule a batch.", *WORKSPACE, _STAGING, *args,
        dtypes={}, vector=Vector(()), result="Array<int>", **fields,
    )  # fmt: skip
