"""`supports`: what it answers, and the slots of whoever answers for an op, in words too.

`fi_ffi` fills them with `fi_ffi.capability` and `fi_ffi.catalogue`. Nothing below imports these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import LoaderError
from fi_ffi.loader.services import Slot

if TYPE_CHECKING:
    from fi_ffi.ops.call.row import Row

RUN, BUILT, REFUSED, MISSING, UNKNOWN = "run", "built", "refused", "missing", "unknown"
# The words for each status in reports.
WORDS = {
    RUN: "works: run on such a GPU",
    BUILT: "built for it, not run",
    REFUSED: "refused",
    MISSING: "not in the wheel",
    UNKNOWN: "not recorded",
}


@dataclass(frozen=True)
class Support:
    """Whether an op can be called; true if it can.

    `status` is one of
    - "run": this project called it on such a GPU;
    - "built": there is code for such a GPU, which this project has not run;
    - "refused": it cannot be called there, whatever is built;
    - "missing": the artifact lacks it; `build` is the command that makes it, if there is one;
    - "unknown": there is no record to tell it.

    `place` is where a call would take the kernel from, if it is known: "explicit", "installed",
    "jit", "local" or "remote" (docs/loading.md). `is_here` is whether its file is on this machine;
    otherwise a call fetches it from the pinned wheel.
    """

    op: str
    status: str
    reason: str
    build: str | None = None
    # The module, or the family if any of its modules would do.
    module: str = ""
    release: str = ""
    place: str = ""
    is_here: bool = False

    def __bool__(self) -> bool:
        return self.status in (RUN, BUILT)

    def __str__(self) -> str:
        advice = f" `{self.build}` makes it." if self.build else ""
        return f"{self.op}: {WORDS[self.status]}: {self.reason}.{advice}"


def no_judge(op: str, asked: Mapping[str, Any], rows: Sequence[Row]) -> Support:
    """Raise `LoaderError`: there is nothing here that judges."""
    raise LoaderError(f"{op}.supports: the judge is missing; it is the package fi_ffi.capability")


# Answers for an op, a function or a plan by its name; `rows` are an op's forms, and empty for all
# others.
judge: Slot[Callable[[str, Mapping[str, Any], Sequence[Row]], Support]] = Slot(no_judge)

# Writes an op's docstring; without the catalogue it is the row's sentence alone.
docstring: Slot[Callable[[Row], str]] = Slot(lambda row: row.doc)


def supports(op: str, rows: Sequence[Row] = (), /, **asked: Any) -> Support:
    """Ask the judge about an op: see `fi_ffi.ops.call.op.Op.supports`."""
    return judge.get()(op, asked, rows)
