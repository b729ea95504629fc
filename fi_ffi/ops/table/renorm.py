"""Filters of whole rows: entries of FlashInfer's `sampling` module, in `csrc/renorm.cu`.

The rows' requirements beyond the bindings' own checks follow `include/flashinfer/air_top_p.cuh` and
`topk.cuh`. If a row does not fit a block, the radix kernels share it between blocks that wait for
each other, and rely on zeroed scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import MULTIPROCESSORS, Row, Rule, Scalar, Tensor, Vector

_SOURCE = "csrc/flashinfer_sampling_binding.cu"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
# The filters' parameters: one number for each row.
MAYBE: dict[str, Any] = {"optional": True, "contiguous": True, "column": True}

# Elements of 4 bytes that a block holds on the GPUs with the least shared memory; one block runs on
# each multiprocessor.
_ROOM = 15000


def rule_of_shared_rows(argument: str, axis: str) -> Rule:
    return Rule(
        argument,
        f"{axis} <= {_ROOM} * {MULTIPROCESSORS}",
        f"of rows of {_ROOM} elements for each multiprocessor of the GPU at most: the blocks that "
        "share one wait for each other",
    )


# A group of blocks has at most 5152 bytes; there are at most half as many groups as
# multiprocessors.
ROW_STATES = Tensor(
    "row_states_buffer",
    "workspace_size",
    "uint8",
    writes=True,
    reads=True,
    contiguous=True,
    alignment=8,
    bytes=2**20,
    zeroed=True,
    doc="scratch of 2^20 bytes, for one stream at a time, zero before its first use; by default "
    "fi_ffi keeps one for each stream",
)


def _aligned(count: int) -> int:
    return round_up(count, 256)


# The kernel that counts in buckets: the number of buckets, its state for a row, and the size of an
# element in the two buffers for the bucket of the last token.
_BUCKETS, _COUNTER_BYTES, _ITEMSIZE = 2048, 384, 4


def top_p_renorm_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of `workspace`: 0 for rows that are searched instead.

    Deterministic sums of buckets have 64 bits, others are floats.
    """
    n, h = sizes["n"], sizes["h"]
    if h < _BUCKETS:
        return 0
    buffer = _aligned(_ITEMSIZE * _aligned(h // 32) * n)
    of_sum = 8 if sizes.get("is_deterministic", True) else 4
    counts = _aligned(of_sum * _BUCKETS * n) + _aligned(4 * _BUCKETS * n)
    return _aligned(_COUNTER_BYTES * n) + counts + 2 * buffer


_LIMITS = ("h >= 1", f"h <= {INT32_MAX}", f"n <= {INT32_MAX}")


def _row(name: str, doc: str, args: tuple[Any, ...], releases: str, **more: Any) -> Row:
    return Row(name, "sampling", name, _SOURCE, doc, args, releases=releases, **more)


def _in_and_out(source: str, out: str, dtype: str, doc: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(source, "n h", dtype, doc, contiguous=True),
        Tensor(out, "n h", dtype, f"may be `{source}` itself", **_OUT),
    )


_T: dict[str, tuple[str, ...]] = {"T": ("float32", "float16", "bfloat16")}
OF_TOKENS = "a number of tokens"
_TOP_K = (
    Tensor(
        "maybe_top_k_arr",
        "n",
        "int32",
        "`top_k_val` of each row; 0 keeps nothing",
        no_index=OF_TOKENS,
        **MAYBE,
    ),
    Scalar(
        "top_k_val",
        int,
        INT32_MAX,
        "number of tokens kept; ties with the last one are kept too",
        low=1,
        high=INT32_MAX,
        instead="maybe_top_k_arr",
    ),
)
_DETERMINISTIC = Scalar(
    "is_deterministic", bool, True, "same result each time, by slower sums in 64-bit integers"
)
_WORKSPACE = Tensor(
    "workspace",
    "workspace_size",
    "uint8",
    writes=True,
    reads=False,
    contiguous=True,
    alignment=128,
    bytes_for=top_p_renorm_bytes,
    bytes_given=("is_deterministic",),
    since="0.6.7",
    doc="scratch of `top_p_renorm_workspace_size(n, h, is_deterministic)` bytes, for one stream at "
    "a time; by default fi_ffi keeps one for each stream",
)

# If the buckets' sums miss `top_p` by a rounding error, the kernel counts the last bucket twice. So
# a `top_p` of 1 may lose part of a row, and more than 1 any part of it, until no sum can be near.
_ALL = 4.0
_WITHIN_REACH = Rule(
    "top_p_val",
    f"maybe_top_p_arr or top_p_val <= 1 or top_p_val >= {_ALL}",
    f"at most 1.0, or {_ALL} for all of a row",
)

_TOP_P_ROW = _row(
    "top_p_renorm_probs",
    "Keep the most probable tokens of each row that sum to `top_p`, and ties with the last of "
    "them; scale them to sum to 1.",
    (
        *_in_and_out("probs", "renorm_probs", "float32", "rows that sum to 1"),
        Tensor("maybe_top_p_arr", "n", "float32", "`top_p_val` of each row", **MAYBE),
        Scalar(
            "top_p_val",
            float,
            _ALL,
            "smallest sum of the kept tokens; 4.0 keeps all, 1.0 may lose the least probable",
            low=0.0,
            instead="maybe_top_p_arr",
        ),
        replace(_DETERMINISTIC, since="0.6.7"),
        _WORKSPACE,
    ),
    ">=0.6.3",
    dtypes={},
    vector=Vector(("h",), dtype="float32"),
    offset_limit=2**31,
    in_place=(("renorm_probs", "probs"),),
    # A grid's second dimension counts rows, an int counts elements.
    requires=("h >= 1", f"h <= {INT32_MAX}", f"n <= {2**16 - 1}", _WITHIN_REACH),
)
_TOP_K_ROW = _row(
    "top_k_renorm_probs",
    "Keep the `top_k` most probable tokens of each row and scale them to sum to 1.",
    (
        *_in_and_out("probs", "renorm_probs", "T", "rows without negative elements"),
        *_TOP_K,
        replace(_DETERMINISTIC, doc="same result each time", since="0.7.1"),
        ROW_STATES,
    ),
    ">=0.6.3",
    dtypes=_T,
    vector=Vector(("h",), dtype="T"),
    in_place=(("renorm_probs", "probs"),),
    requires=(*_LIMITS, rule_of_shared_rows("probs", "h")),
)

ROWS = (
    *forms_of(_TOP_P_ROW),
    *forms_of(_TOP_K_ROW, {"0.7.1": {"variant": "_deterministic"}}),
    _row(
        "top_k_mask_logits",
        "Keep the `top_k` greatest logits of each row and set the others to -inf.",
        (
            *_in_and_out("logits", "mask_logits", "T", "rows of logits without NaN"),
            *_TOP_K,
            ROW_STATES,
        ),
        ">=0.6.3",
        dtypes=_T,
        vector=Vector(("h",), dtype="T"),
        in_place=(("mask_logits", "logits"),),
        requires=(*_LIMITS, rule_of_shared_rows("logits", "h")),
    ),
)
