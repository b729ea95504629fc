"""The matrix: every op and entry that can be asked about, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fi_ffi.errors import ArgumentError, printed
from fi_ffi.ops import attention as public
from fi_ffi.ops.capability.attention import SAMPLES, judge_attention
from fi_ffi.ops.capability.judgement import Query, Sm, Support, judge
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.gdn import FAMILY as GDN_DECODE
from fi_ffi.ops.gdn import judge_decode
from fi_ffi.ops.mamba import FAMILY, judge_states
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.moe import interface as moe
from fi_ffi.ops.moe import lora
from fi_ffi.ops.moe.modes import MODES
from fi_ffi.ops.moe.weights import WEIGHTS
from fi_ffi.ops.row import Row
from fi_ffi.ops.table.gemm import FP8

# Rows that are no ops of the table: those of packages in `fi_ffi/ops` whose functions do
# something around the entries they call.  Attention's options name modules: they are judged by
# `capability.attention`.
PACKAGES = {"matmul": matmul.ROWS, "moe": lora.ROWS}
# The functions that call what is not called as its row: the function, and how it is asked to.
_CALLED_BY = {
    "cutlass_segment_gemm": ("segment_gemm", "sm80"),
    "cutlass_segment_gemm_sm90": ("segment_gemm", "sm90"),
    "bgmv_moe_shrink": ("bgmv_moe", ""),
}
# What those call besides.
_CALLED_THEN = {"bgmv_moe_expand"}
# Those that FlashInfer's wheels are made for, and a Jetson: ten times the capability.
SMS = (75, 80, 87, 89, 90, 100, 103, 110, 120, 121)


@dataclass(frozen=True)
class Line:
    """An op, or one way to ask for it; `options` says which."""

    op: str
    options: str
    family: str
    ask: Callable[[Query], Support]

    @property
    def name(self) -> str:
        return f"{self.op} ({self.options})" if self.options else self.op


def package_entries() -> Iterator[tuple[str, str, tuple[Row, ...]]]:
    """Package, name and forms: rows of one name and module are forms of one entry."""
    for package, rows in PACKAGES.items():
        forms: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            forms.setdefault((row.name, row.module), []).append(row)
        for (name, module), found in forms.items():
            several = sum(other == name for other, _ in forms) > 1
            yield package, f"{name} ({module})" if several else name, tuple(found)


def entry_row(
    module: str,
    symbol: str,
    releases: str = ">=0.6.3",
    capabilities: tuple[int, ...] = (),
    modules: Mapping[tuple[int, int], str] | None = None,
) -> Row:
    """What can be judged of an entry that has no row of its own."""
    name = f"{module}.{symbol}"
    more: dict[str, Any] = {"capabilities": capabilities, "modules": modules or {}}
    return Row(name, module, symbol, "", "", (), {}, releases, **more)


def lines() -> Iterator[Line]:
    """Every op of the table, and what is called by packages of their own."""
    for name, op in OPS.items():
        yield Line(name, "", op.row.module, partial(judge, name, op.rows))
    for package, entry, forms in package_entries():
        name, way = _CALLED_BY.get(entry, (entry, ""))
        if entry not in _CALLED_THEN:
            yield Line(name, way, package, partial(judge, name, forms))
    name = "tinygemm_bf16"
    yield Line(name, "", "matmul", partial(judge, name, OPS["tinygemm2"].rows))
    for name in ("cutlass_fused_moe", "FusedMoe"):
        for mode in MODES:
            releases = mode.releases or ">=0.6.3"
            row = entry_row(moe.MODULE, "run_moe", releases, mode.capabilities, moe.MODULES)
            yield Line(name, mode.name, moe.MODULE, partial(judge, name, [row]))
    name = WEIGHTS.row.name
    yield Line(name, "", moe.MODULE, partial(judge, name, [WEIGHTS.row]))
    yield Line(FAMILY, "", FAMILY, partial(judge_states, FAMILY, compiled={}))
    yield Line(GDN_DECODE, "", GDN_DECODE, partial(judge_decode, GDN_DECODE, compiled={}))
    for name in public.__all__:
        if hasattr(getattr(public, name), "supports"):
            for label, options in SAMPLES.get(name, {"": {}}).items():
                ask = partial(judge_attention, name, options=options)
                yield Line(name, label, "attention", ask)


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
    """Judge whether a function that has lines of its own can be called.

    `backend` is of `segment_gemm`, which chooses between two; `mode` is of `cutlass_fused_moe` and
    `FusedMoe`: one of docs/moe.md's.
    """
    query = Query.of(sm, release, cuda, dtypes, kernels)
    found = {line.options: line for line in lines() if line.op == name}
    if MODES[0].name in found:
        if mode not in found:
            raise ArgumentError(name, "mode", got=printed(mode), expected=" or ".join(found))
        return found[mode].ask(query)
    if backend == "auto" and len(found) > 1:
        is_hopper = query.capability is None or query.capability[0] == 9
        is_fp8 = any({*names} & {*FP8} for names in query.dtypes.values())
        backend = "sm90" if is_hopper or is_fp8 else "sm80"
    elif backend == "auto":
        (backend,) = found
    if backend not in found:
        raise ArgumentError(name, "backend", got=backend, expected=" or ".join(["auto", *found]))
    return found[backend].ask(query)
