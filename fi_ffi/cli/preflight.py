"""`fi-ffi doctor OP...`: yes or no for ops on a GPU, with the reason.

What is asked of a GPU that is not here (`--sm`) is answered from the kernels' own headers, and
their entries are attested all the same: neither takes a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click

from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import machine, runtime
from fi_ffi.ops.capability.judgement import Query
from fi_ffi.ops.capability.matrix import Line, lines
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits


@dataclass(frozen=True)
class Answer:
    """Whether an op can be called on a GPU, and why; `build` makes what is missing."""

    op: str
    sm: int
    works: bool
    reason: str
    build: str | None = None


def preflight(
    names: Sequence[str], sm: str | None, kernels: str | None, unfit: Iterable[str]
) -> list[Answer]:
    """The answers for ops, by name; `unfit` is what this machine lacks for any call."""
    known = [*lines()]
    for name in names:
        if name not in [line.op for line in known]:
            ops = ", ".join(dict.fromkeys(line.op for line in known))
            raise click.UsageError(f"no op {name!r}; there are {ops}")
    if sm is None and not machine.device_count():
        raise click.UsageError("this process sees no GPU: --sm 87 asks for one that is not here")
    if kernels:
        runtime.use_source(kernels)
    query, missing = Query.of(sm), [*unfit]
    wanted = [line for line in known if line.op in names]
    return [_answer(line, query, None if sm else 0, missing) for line in wanted]


def _answer(line: Line, query: Query, device: int | None, missing: list[str]) -> Answer:
    assert query.capability is not None
    major, minor = query.capability
    found = line.ask(query)
    works, reason = bool(found), found.reason
    if works and missing:  # then the kernel is not even loaded
        works, reason = False, "; ".join(missing)
    elif works and query.sources:
        try:
            reason += "; entry attested" if _attest(line.op, query.release, device) else ""
        except FiFfiError as error:
            works, reason = False, str(error)
    elif works:
        reason += ", and nothing is here yet: it is fetched when it is first called"
    return Answer(line.name, 10 * major + minor, works, reason, found.build)


def _attest(name: str, release: str, device: int | None) -> bool:
    """Raise where an op's entry is not the declared one; whether there was one to ask."""
    rows = OPS[name].rows if name in OPS else ()
    row = next((row for row in rows if fits(row, release)), None)
    if row is None or row.factory:  # of a family, or made by its module: judged by its file alone
        return False
    runtime.kernel_entry(row.module, row.signature, row.releases, device)
    return True


def show(answers: list[Answer]) -> bool:
    """Print the answers; whether all are yes."""
    rows = [(a.op, f"sm_{a.sm}", "yes" if a.works else "no", a.reason) for a in answers]
    output.print_table("", ("op", "GPU", "", "why"), rows)
    builds = [a.build for a in answers if a.build and not a.works]
    for build in dict.fromkeys(builds):
        click.echo(f"`{build}` makes it, and puts it where it is found.")
    return all(answer.works for answer in answers)
