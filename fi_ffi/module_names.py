"""Names of kernel modules, checked and parsed.

    uri("batch_prefill", release="0.6.13", dtype_q="bf16", head_dim_qk=128, backend="fa3")
    parse("batch_prefill_with_kv_cache_dtype_q_bf16_…_f16qk_False_sm90").params

are inverse to each other. `fi_ffi.loader.uris` has the rows. Loading a kernel needs no name's
parts. What lists, explains or judges modules does, and so do the numpy kernels, which one module's
name tells what to compute.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fi_ffi.loader.uris import (
    ROWS,
    Kind,
    Params,
    Row,
    Value,
    Words,
    family_row,
    span,
    version_of,
)


@dataclass(frozen=True)
class ModuleName:
    """A parsed module name.

    `params` are named as in FlashInfer's generators; dtypes are short names (`DTYPES` has the long
    ones).
    """

    name: str
    family: str
    params: Params = field(hash=False)
    row: Row = field(repr=False, compare=False)

    @property
    def backend(self) -> str:
        """`fa2` or `fa3`, or "" if the family has no such choice."""
        return str(self.params.get("backend", ""))

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype parameters, without those that are None."""
        kinds, given = self.row.kinds, self.params.items()
        return {name: str(v) for name, v in given if v is not None and kinds[name].is_dtype}

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head sizes: (qk, vo), (ckv, kpe), or a single one."""
        given = self.params.items()
        return tuple(v for name, v in given if name.startswith("head_dim") and isinstance(v, int))

    @property
    def releases(self) -> str:
        """The releases that use this name, as text."""
        return span(row for row in ROWS if match(row, self.name) is not None)


def _refuse_stride(params: Params) -> str | None:
    mode, surface = params["paged_kv_stride_mode"], params["module_surface"]
    if params["backend"] == "fa3" and (mode, surface) != ("runtime", "full"):
        return "paged_kv_stride_mode='runtime' and module_surface='full' with fa3"
    if surface == "paged" and mode != "independent":
        return "paged_kv_stride_mode='independent' with module_surface='paged'"
    return None


def _refuse_xqa(params: Params) -> str | None:
    q_seq_len, ratio = params["q_seq_len"], params["head_group_ratio"]
    if params["use_spec_dec"] != (q_seq_len != 1):
        return "use_spec_dec exactly where q_seq_len is above 1"
    # The SM90 kernel has instances for a fixed query length up to 32 rows; beyond them,
    # use_ragged_q changes nothing.
    fits = isinstance(q_seq_len, int) and isinstance(ratio, int) and q_seq_len * ratio <= 32
    if params.get("use_ragged_q") and (q_seq_len == 1 or not fits):
        return "q_seq_len above 1, and q_seq_len * head_group_ratio up to 32, with use_ragged_q"
    return None


# By a parameter that only the rows with restrictions have.
_REFUSALS: dict[str, Callable[[Params], str | None]] = {
    "module_surface": _refuse_stride,
    "use_spec_dec": _refuse_xqa,
}


def refusal(params: Params) -> str | None:
    """Return the requirement that this combination violates; None if it is valid."""
    checks = (check for name, check in _REFUSALS.items() if name in params)
    return next((reason for check in checks if (reason := check(params))), None)


def complete(row: Row, params: Params) -> dict[str, Value]:
    """Check parameters and their combination, and add defaults, as the row has them."""
    values = row.complete(params)
    if reason := refusal(values):
        raise row.error(", ".join(params), "this combination", reason)
    return values


def uri(family: str, *, release: str, **params: Value) -> str:
    """Return the name that `release` gives the module of `family` compiled for `params`.

    Dtypes may be short or long names ("f16", "float16"); "fp4" is NVFP4 under any release's name.
    Omitted parameters take the most common value of FlashInfer's published wheels: keys, values and
    outputs of the query's dtype, int32 indices, equal head sizes, no option, fa2. Raises
    ArgumentError for a parameter, a value or a combination that the family does not have in this
    release.
    """
    row = family_row(family, release)
    return row.render(complete(row, params))


def pattern_of(kind: Kind) -> str:
    """Return a regular expression without groups that matches exactly the texts of a kind."""
    if isinstance(kind, Words):
        # Longest first: "sm10" must not hide "sm100".
        return "|".join(re.escape(text) for text in sorted(kind.words.values(), key=len)[::-1])
    digits = "[1-9][0-9]{0,8}"
    if kind.before:
        return f"(?:{kind.before}{digits})?"
    return digits if kind.low else f"0|{digits}"


@functools.cache
def row_pattern(row: Row) -> re.Pattern[str]:
    """Return the pattern of a row's names, with a group for each parameter."""
    pieces = []
    for literal, name in row.parts:
        pieces.append(re.escape(literal))
        if name is not None:
            pieces.append(f"(?P<{name}>{pattern_of(row.kinds[name])})")
    return re.compile("".join(pieces))


def match(row: Row, name: str) -> dict[str, Value] | None:
    """Return the parameters in a name, or None if the row's rule does not apply."""
    # Before the pattern is compiled, which takes longer than all the rest.
    found = row_pattern(row).fullmatch(name) if name.startswith(row.parts[0][0]) else None
    if found is None:
        return None
    params = {key: row.kinds[key].value(text) for key, text in found.groupdict().items()}
    return None if refusal(params) else params


@functools.lru_cache(maxsize=8)
def _rows(release: str | None) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if release is None or row.holds_for(release))


def parse(name: str, release: str | None = None) -> ModuleName | None:
    """Parse a name by the rules of `release`, or of any release; None if it follows none."""
    if release is not None:
        version_of(release)
    for row in _rows(release):
        params = match(row, name)
        if params is not None:
            return ModuleName(name, row.family, params, row)
    return None
