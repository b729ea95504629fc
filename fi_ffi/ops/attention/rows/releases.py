"""Which FlashInfer releases have which arguments: a row for each form that an entry has had.

Read from the binding sources and `jit/attention/modules.py` of every release from 0.6.3 to
0.7.2.post1; `tests/releases` holds the rows against those that kernels are pinned of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fi_ffi.ops.row import Row

OLDEST = "0.6.3"
# Forms of this release come first, and are what the CPU's reference has: the lock's default.
FIRST = "0.6.13"
# The first release that has an argument, where that is not the oldest.
SINCE = {
    "maybe_k_cache_sf": "0.6.10",
    "maybe_v_cache_sf": "0.6.10",
    "ckv_scale": "0.6.14",
    "kpe_scale": "0.6.14",
    "uniform_q_len": "0.6.16",
    "kSfCacheVLLM": "0.6.7",
    "vSfCacheVLLM": "0.6.7",
    "qCuSeqLens": "0.6.16",
    "maybe_ckv_scale_arr": "0.6.18",
}


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def forms_of(
    row: Row, until: str = "", changed: Mapping[str, Callable[[Row], Row]] | None = None
) -> tuple[Row, ...]:
    """A row that has all arguments there ever were, in each form of it, that of `FIRST` first.

    `until` is the first release that has no such entry any more.  `changed` has releases
    in which something else than the arguments changed: what a row was before.
    """
    changed = changed or {}
    begins = {SINCE[arg.name] for arg in row.args if arg.name in SINCE}
    starts = sorted({OLDEST, *begins, *changed}, key=_number)
    forms = []
    for start, end in zip(starts, [*starts[1:], until], strict=True):
        form = replace(
            row,
            args=tuple(
                arg for arg in row.args if _number(SINCE.get(arg.name, OLDEST)) <= _number(start)
            ),
            releases=f">={start},<{end}" if end else f">={start}",
        )
        for release, before in changed.items():
            if _number(start) < _number(release):
                form = before(form)
        forms.append(form)
    first = max(i for i, start in enumerate(starts) if _number(start) <= _number(FIRST))
    return (forms[first], *forms[:first], *forms[first + 1 :])


def span(forms: Sequence[Row]) -> str:
    """The releases that any of a row's forms is of: there is no gap between them."""
    ends = [form.releases.partition("<")[2] for form in forms]
    return f">={OLDEST}" + ("" if "" in ends else f",<{max(ends, key=_number)}")
