"""What a run's plan says of its requests, for the conditions of attention's rows.

Those are stated as all rows state them (`fi_ffi.reference.indices`), of the requests that the plan
has: its arrays may have room for more. What is listed, and how long, fa3, MLA and batch attention
read from the plan, and the others from the run's arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention import formula, plan

Facts = Callable[[Mapping[str, Any]], dict[str, Any]]

_KINDS = {
    "batch_attention": plan.ATTENTION,
    "batch_decode": plan.DECODE,
    "batch_mla": plan.MLA,
    "batch_pod": plan.FA2,
    "pod": plan.FA2,
}
_STARTS = ("qo_indptr", "kv_indptr", "indptr", "paged_kv_indptr", "maybe_mask_indptr")
_OF_EACH = ("kv_len_arr", "kv_len", "paged_kv_last_page_len", "maybe_prefix_len_ptr")


def facts_of(family: str, kernel: str) -> Facts | None:
    """Return what finds a kernel's facts among its arguments and sizes; None if it has no plan."""
    if kernel.startswith("plan"):
        return _of_planner
    if family.startswith("batch_prefill"):
        kind = plan.FA3 if "fa3" in kernel else plan.FA2
    elif family in _KINDS:
        kind = _KINDS[family]
    else:
        return None
    return functools.partial(_of_run, kind)


def _of_planner(known: Mapping[str, Any]) -> dict[str, Any]:
    count = known["batch_size"] if "batch_size" in known else len(known["kv_len"])
    return _of_requests(known, int(count), "")


def _of_requests(known: Mapping[str, Any], count: int, half: str) -> dict[str, Any]:
    """Return the arrays of the first requests."""
    found = {}
    for names, room in ((_STARTS, count + 1), (_OF_EACH, count)):
        for name in (f"{name}{half}" for name in names):
            if known.get(name) is not None:
                found[name] = known[name][:room].astype(np.int64)
    return found


def _of_run(kind: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a run, or of both halves of one."""
    found: dict[str, Any] = {}
    for half in ("", "_p", "_d"):
        if f"int_workspace_buffer{half}" in known:
            found |= _of_half(kind, known, half)
    return found


def _of_half(kind: int, known: Mapping[str, Any], half: str) -> dict[str, Any]:
    info = known.get(f"plan_info_vec{half}", known.get("plan_info_vec"))
    planned = plan.load(kind, known[f"int_workspace_buffer{half}"], info)
    found = _of_requests(known, planned.batch_size, half)
    starts = planned.kv_indptr.astype(np.int64)
    if kind in (plan.FA2, plan.DECODE):
        paged = found.get(f"paged_kv_indptr{half}")
        starts = found[f"kv_indptr{half}"] if paged is None else paged

    def tokens() -> Array:
        if kind not in (plan.FA2, plan.DECODE):
            return planned.kv_len.astype(np.int64)
        lasts = found.get(f"paged_kv_last_page_len{half}")
        if lasts is None:
            return np.diff(starts)
        return formula.lengths(starts, lasts, known["page_size"])

    def listed(pages: Array) -> Array:
        """Return for each element of a list of pages whether a request has it."""
        read = np.zeros(len(pages), bool)
        counts = -(-tokens() // known["page_size"])
        for start, count in zip(starts.tolist(), counts.tolist(), strict=False):
            read[start : start + count] = True
        return read

    def bytes_of_masks() -> Array:
        bits: Array = np.diff(found[f"qo_indptr{half}"]) * tokens()
        return -(-bits // 8)

    functions = {"tokens": tokens, "listed": listed, "bytes_of_masks": bytes_of_masks}
    return found | {f"{name}{half}": function for name, function in functions.items()}
