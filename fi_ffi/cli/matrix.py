"""`fi-ffi list --matrix`: where each op can be called."""

from __future__ import annotations

from typing import Any

import click

from fi_ffi.cli import output
from fi_ffi.ops.capability.judgement import WORDS, Query, Support
from fi_ffi.ops.capability.known_issues import KNOWN_ISSUES, KnownIssue
from fi_ffi.ops.capability.matrix import SMS, Line, lines

_SYMBOLS = {"run": "run", "built": "built", "refused": "-", "missing": "lacks", "unknown": "?"}
_FEW = 4  # lines that are explained at once


def show(
    kernels: str | None, release: str | None, cuda: str | None, wanted: str | None, as_json: bool
) -> None:
    """Print the matrix, of the lines whose op or family is `wanted`."""
    chosen = [line for line in lines() if wanted in (None, line.op, line.family)]
    if not chosen:
        names = ", ".join(dict.fromkeys(line.op for line in lines()))
        raise click.ClickException(f"no op or family {wanted!r}; there are {names}")
    queries = {sm: Query.of(sm, release, cuda, None, kernels) for sm in SMS}
    found = {line.name: {sm: line.ask(q) for sm, q in queries.items()} for line in chosen}
    first = next(iter(queries.values()))
    of = ", ".join(s.location for s in first.sources) or f"the {first.cuda} wheels"
    head = {"kernels": of, "release": first.release, "cuda": first.cuda}
    if as_json:
        answers = {name: {sm: _json(s) for sm, s in row.items()} for name, row in found.items()}
        cases = {issue.name: _case(issue, queries) for issue in KNOWN_ISSUES}
        output.print_json({**head, "ops": answers, "cases": cases})
        return
    columns = ("op", *(f"SM{sm}" for sm in SMS))
    rows = [(name, *(_SYMBOLS[s.status] for s in row.values())) for name, row in found.items()]
    output.print_table(f"FlashInfer {first.release}, {of}", columns, rows)
    click.echo("  ".join(f"{symbol}: {WORDS[status]}" for status, symbol in _SYMBOLS.items()))
    _explain(chosen, found)


def _explain(chosen: list[Line], found: dict[str, dict[int, Support]]) -> None:
    """The reasons, where few lines were asked for; else how to ask for them."""
    if len(chosen) > _FEW:
        click.echo("--family OP has the reasons of an op; --json has all, and vLLM's cases.")
        return
    for name, row in found.items():
        said: dict[str, list[str]] = {}
        for sm, answer in row.items():
            # What builds it is for one GPU, and is in the JSON.
            said.setdefault(f"{WORDS[answer.status]}: {answer.reason}", []).append(f"SM{sm}")
        click.echo(f"{name}:")
        for text, sms in said.items():
            click.echo(f"  {', '.join(sms)}: {text}")


def _json(answer: Support) -> dict[str, Any]:
    return {
        "status": answer.status,
        "works": bool(answer),
        "reason": answer.reason,
        "module": answer.module,
        "build": answer.build,
    }


def _case(issue: KnownIssue, queries: dict[int, Query]) -> dict[str, Any]:
    return {
        "title": issue.title,
        "cause": issue.cause,
        "advice": issue.advice,
        "entries": issue.entries,
        "answers": {
            sm: [{"op": a.op, **_json(a)} for a in issue.found(query)]
            for sm, query in queries.items()
        },
    }
