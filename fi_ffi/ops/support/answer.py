"""The answer to whether an op can be called, and why."""

from __future__ import annotations

from dataclasses import dataclass

RUN, BUILT, REFUSED, MISSING, UNKNOWN = "run", "built", "refused", "missing", "unknown"
# What each status is called for people.
WORDS = {
    RUN: "works: run on such a GPU",
    BUILT: "built for it, not run",
    REFUSED: "refused",
    MISSING: "not in the wheel",
    UNKNOWN: "not recorded",
}


@dataclass(frozen=True)
class Support:
    """Whether an op can be called; true where it can.

    `status` is "run" (this project called it on such a GPU), "built" (there is code for
    such a GPU, and nobody here ran it), "refused" (it cannot be called there, whatever is
    built), "missing" (the artifact lacks it: `build` makes it, where it can be made), or
    "unknown" (what the artifact has was not recorded).
    """

    op: str
    status: str
    reason: str
    build: str | None = None
    # The module that was asked about, or the family where no one module was.
    module: str = ""
    release: str = ""

    def __bool__(self) -> bool:
        return self.status in (RUN, BUILT)

    def __str__(self) -> str:
        advice = f" `{self.build}` makes it." if self.build else ""
        return f"{self.op}: {WORDS[self.status]}: {self.reason}.{advice}"
