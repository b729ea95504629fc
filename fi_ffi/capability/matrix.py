"""The matrix: every op and entry that can be judged, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from fi_ffi.capability.attention import SAMPLES, judge_attention
from fi_ffi.capability.judgement import Query, entry_row, judge
from fi_ffi.capability.states import STATES, OfOptions
from fi_ffi.ops import attention, plans
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import Support
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.moe import interface as moe
from fi_ffi.ops.moe import lora
from fi_ffi.ops.moe.modes import MODES
from fi_ffi.ops.moe.weights import WEIGHTS
from fi_ffi.ops.table import comm

# Rows outside the op table: those of packages in `fi_ffi/ops` whose functions work around the
# entries they call. `capability.attention` judges attention, whose options determine modules.
PACKAGES = {"matmul": matmul.ROWS, "moe": lora.ROWS, "comm": comm.OPS}
# For rows without an op of that name, the function that calls the entry, and its option for it.
_CALLED_BY = {
    "cutlass_segment_gemm": ("segment_gemm", "sm80"),
    "cutlass_segment_gemm_sm90": ("segment_gemm", "sm90"),
    "bgmv_moe_shrink": ("bgmv_moe", ""),
}
# Entries that those functions call in addition.
_CALLED_THEN = {"bgmv_moe_expand"}
# The GPUs of FlashInfer's wheels and a Jetson, as ten times the compute capability.
SMS = (75, 80, 87, 89, 90, 100, 103, 110, 120, 121)

# Plans and functions that `capability.attention` judges.
ATTENTION = sorted(
    name
    for package in (attention, plans)
    for name in package.__all__
    if hasattr(getattr(package, name), "supports")
)


@dataclass(frozen=True)
class Line:
    """An op, or one way to call it, which `options` names."""

    op: str
    options: str
    family: str
    ask: Callable[[Query], Support]

    @property
    def name(self) -> str:
        return f"{self.op} ({self.options})" if self.options else self.op


def package_entries() -> Iterator[tuple[str, str, tuple[Row, ...]]]:
    """Return package, name and forms of each entry; rows of one name and module are forms of one
    entry."""
    for package, rows in PACKAGES.items():
        forms: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            forms.setdefault((row.name, row.module), []).append(row)
        for (name, module), alike in forms.items():
            several = sum(other == name for other, _ in forms) > 1
            yield package, f"{name} ({module})" if several else name, tuple(alike)


def lines() -> Iterator[Line]:
    """Return every op of the table, and the functions of packages."""
    for name, op in OPS.items():
        yield Line(name, "", op.row.module, partial(judge, name, op.rows))
    for package, entry, forms in package_entries():
        name, way = _CALLED_BY.get(entry, (entry, ""))
        if entry not in _CALLED_THEN:
            yield Line(name, way, package, partial(judge, name, forms))
    name = "tinygemm_bf16"
    yield Line(name, "", "matmul", partial(judge, name, OPS["tinygemm2"].rows))
    for name in ("cutlass_fused_moe", "FusedMoe"):
        of_modes: dict[str, list[Row]] = {}
        for mode in MODES:
            releases = mode.releases or ">=0.6.3"
            row = entry_row(moe.MODULE, "run_moe", releases, mode.capabilities, moe.MODULES)
            of_modes.setdefault(mode.name, []).append(row)
        for mode_name, rows in of_modes.items():
            yield Line(name, mode_name, moe.MODULE, partial(judge, name, rows))
    orders = WEIGHTS.rows
    yield Line(orders[0].name, "", moe.MODULE, partial(judge, orders[0].name, orders))
    for name, judge_state in STATES.items():
        yield Line(name, "", name, partial(_with_defaults, judge_state, name))
    for name in ATTENTION:
        for label, options in SAMPLES.get(name, {"": {}}).items():
            ask = partial(judge_attention, name, options=options)
            yield Line(name, label, "attention", ask)


def _with_defaults(judged: OfOptions, op: str, query: Query) -> Support:
    return judged(op, query, {})
