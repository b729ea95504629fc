"""Answers `supports`, for an op, a function or a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fi_ffi.capability.attention import judge_attention
from fi_ffi.capability.judgement import Query, Sm, judge
from fi_ffi.capability.matrix import ATTENTION, lines
from fi_ffi.capability.states import STATES
from fi_ffi.errors import printed
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import Support
from fi_ffi.ops.moe.modes import MODES
from fi_ffi.ops.table.gemm import FP8


def judge_call(
    name: str,
    sm: Sm = None,
    *,
    release: str | None = None,
    cuda: str | None = None,
    dtypes: object = None,
    kernels: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    mode: str = MODES[0].name,
) -> Support:
    """Judge whether a function with lines of its own can be called.

    `backend` is an option of `segment_gemm`. `mode` is a mode of `cutlass_fused_moe` and
    `FusedMoe`: see docs/moe.md.
    """
    refuse = Refusal(name)
    query = Query.of(sm, release, cuda, dtypes, kernels)
    ways = {line.options: line for line in lines() if line.op == name}
    if MODES[0].name in ways:
        if mode not in ways:
            raise refuse("mode", printed(mode), " or ".join(ways))
        return ways[mode].ask(query)
    if backend == "auto" and len(ways) > 1:
        is_hopper = query.capability is None or query.capability[0] == 9
        is_fp8 = any({*names} & {*FP8} for names in query.dtypes.values())
        backend = "sm90" if is_hopper or is_fp8 else "sm80"
    elif backend == "auto":
        (backend,) = ways
    if backend not in ways:
        raise refuse("backend", backend, " or ".join(["auto", *ways]))
    return ways[backend].ask(query)


def judge_asked(op: str, asked: Mapping[str, Any], rows: Sequence[Row] = ()) -> Support:
    """Answer `supports`: the `Judge` of `fi_ffi.ops.call.support`."""
    if rows:
        return judge(op, rows, Query.of(**asked))
    of_options = STATES.get(op) or (judge_attention if op in ATTENTION else None)
    if of_options is None:
        return judge_call(op, **asked)
    options = dict(asked)
    where = {name: options.pop(name, None) for name in ("sm", "release", "cuda", "kernels")}
    return of_options(op, Query.of(**where), options)
