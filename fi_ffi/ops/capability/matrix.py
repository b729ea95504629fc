"""The matrix: every op and entry that can be asked about, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from fi_ffi.ops import attention as public
from fi_ffi.ops.capability.attention import SAMPLES, judge_attention
from fi_ffi.ops.capability.judgement import Query, Support, judge
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.moe import interface as moe
from fi_ffi.ops.row import Row

# Rows that are no ops of the table: those of packages in `fi_ffi/ops` whose functions do
# something around the entries they call.  Attention's options name modules: they are judged by
# `capability.attention`.
PACKAGES = {"matmul": matmul.ROWS}
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
    module: str, symbol: str, releases: str = ">=0.6.3", capabilities: tuple[int, ...] = ()
) -> Row:
    """What can be judged of an entry that has no row of its own."""
    name = f"{module}.{symbol}"
    return Row(name, module, symbol, "", "", (), {}, releases, capabilities=capabilities)


def lines() -> Iterator[Line]:
    """Every op of the table, and what is called by packages of their own."""
    for name, op in OPS.items():
        yield Line(name, "", op.row.module, partial(judge, name, op.rows))
    for package, name, forms in package_entries():
        yield Line(name, "", package, partial(judge, name, forms))
    name = "cutlass_fused_moe"
    rows = [entry_row(moe.MODULE, "run_moe", one.releases, (9,)) for one in moe.INTERFACES]
    yield Line(name, "", moe.MODULE, partial(judge, name, rows))
    for name in public.__all__:
        if hasattr(getattr(public, name), "supports"):
            for label, options in SAMPLES.get(name, {"": {}}).items():
                ask = partial(judge_attention, name, options=options)
                yield Line(name, label, "attention", ask)
