"""Names of kernel modules, built and read in one place.

    uri("batch_prefill", release="0.6.13", dtype_q="bf16", head_dim_qk=128, backend="fa3")
    parse("batch_prefill_with_kv_cache_dtype_q_bf16_…_f16qk_False_sm90").params

are inverse to each other.  FlashInfer calls a module by its family and everything it was
compiled for, and a release may change how; `table.py` has the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from fi_ffi.errors import ArgumentError
from fi_ffi.loader.uris.kinds import DTYPES, Value, is_dtype
from fi_ffi.loader.uris.row import Row, span, version_of
from fi_ffi.loader.uris.table import ROWS

__all__ = [
    "DTYPES",
    "ROWS",
    "ModuleName",
    "Row",
    "Value",
    "family_row",
    "is_dtype",
    "parse",
    "uri",
]


@dataclass(frozen=True)
class ModuleName:
    """A module's name, taken apart.

    `params` are named as FlashInfer's generators have them; dtypes are short names
    (`fi_ffi.loader.uris.DTYPES` has the long ones).
    """

    name: str
    family: str
    params: Mapping[str, Value] = field(hash=False)
    row: Row = field(repr=False, compare=False)

    @property
    def backend(self) -> str:
        """`fa2` or `fa3`, or "" where the family has no choice of them."""
        return str(self.params.get("backend", ""))

    @property
    def dtypes(self) -> dict[str, str]:
        """The parameters that are dtypes, without those that are None."""
        kinds = self.row.kinds
        return {
            name: str(value)
            for name, value in self.params.items()
            if value is not None and is_dtype(kinds[name])
        }

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head sizes: (qk, vo), (ckv, kpe), or the only one."""
        return tuple(
            value
            for name, value in self.params.items()
            if name.startswith("head_dim") and isinstance(value, int)
        )

    @property
    def releases(self) -> str:
        """The releases that have such names, in words."""
        return span(row for row in ROWS if row.match(self.name) is not None)


@functools.lru_cache(maxsize=8)
def _rows(release: str | None) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if release is None or row.holds_for(release))


def family_row(family: str, release: str) -> Row:
    """The row of a family in a release.

    ArgumentError where FlashInfer never had it, and where this release does not.
    """
    rows = [row for row in ROWS if row.family == family]
    for row in rows:
        if row.holds_for(release):
            return row
    if rows:
        expected = f"a release {span(rows)}"
        raise ArgumentError(f"uri of {family}", "release", got=release, expected=expected)
    families = sorted({row.family for row in ROWS})
    close = get_close_matches(family, families, n=3)
    expected = " or ".join(close) if close else f"one of {', '.join(families)}"
    raise ArgumentError("uri", "family", got=repr(family), expected=expected)


def uri(family: str, *, release: str, **params: Value) -> str:
    """The name of the module of `family` compiled for `params`, as `release` has it.

    Dtypes may be short or long names ("f16", "float16").  What is left out has the
    value that FlashInfer's published wheels have most: keys, values and outputs of the
    query's dtype, int32 indices, equal head sizes, no option, fa2.  ArgumentError
    for a parameter or a value that the family does not have in this release.
    """
    row = family_row(family, release)
    return row.render(row.complete(params))


def parse(name: str, release: str | None = None) -> ModuleName | None:
    """A name taken apart by the rules of `release`, or of any; None if it follows none."""
    if release is not None:
        version_of(release)
    for row in _rows(release):
        params = row.match(name)
        if params is not None:
            return ModuleName(name, row.family, params, row)
    return None
