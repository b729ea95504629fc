"""`fi-ffi list`: the modules of an artifact, and what they serve.

The builtin `list` is hidden here by the command, which has its name for its name.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError, KernelNotFoundError
from fi_ffi.loader import search
from fi_ffi.loader.catalogue import Module, modules_of
from fi_ffi.loader.held import facts_of
from fi_ffi.loader.kernels import KernelSource, open_source
from fi_ffi.loader.lock import wanted_release
from fi_ffi.loader.uris import ModuleName
from fi_ffi.loader.urls import fetching
from fi_ffi.ops.capability.judgement import WORDS, Query, Support
from fi_ffi.ops.capability.known_issues import KNOWN_ISSUES, KnownIssue
from fi_ffi.ops.capability.matrix import SMS, Line, lines
from fi_ffi.ops.table import ROWS

# Parameters with a column of their own.
_OWN = ("backend", "head_dim")
# How a matrix shows a support's status.
_SYMBOLS = {"run": "run", "built": "built", "refused": "-", "missing": "lacks", "unknown": "?"}
_FEW = 4  # lines that are explained at once


@click.command()
@click.option(
    "--kernels",
    type=click.Path(exists=True, path_type=Path),
    help="A directory or wheel of kernels; by default the first place that has any.",
)
@click.option("--family", help="Only modules of this family, such as batch_prefill or norm.")
@click.option("--fetch", is_flag=True, help="Fetch what is not here, to list it.")
@click.option("--entries", is_flag=True, help="Open every module: its functions and GPUs too.")
@click.option("--matrix", is_flag=True, help="Where each op can be called, by GPU, and why not.")
@click.option("--release", help="With --matrix: of a release's wheels, such as 0.6.13.")
@click.option("--cuda", help="With --matrix: of the wheels of a CUDA tag, such as cu130.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list(
    kernels: Path | None, family: str | None, fetch: bool, entries: bool, as_json: bool,
    matrix: bool, release: str | None, cuda: str | None,
) -> None:  # fmt: skip
    """List the kernel modules at hand: family, dtypes, head sizes, backend, the ops they serve.

    All of it is in the modules' names, so nothing is extracted for it but with --entries, and
    nothing fetched but with --fetch.  --matrix is of the kernels in use, or where there are none,
    or a release or a CUDA tag is named, of what FlashInfer publishes.
    """
    if matrix:
        _matrix(None if kernels is None else str(kernels), release, cuda, family, as_json)
        return
    if release or cuda:
        raise click.UsageError("--release and --cuda go with --matrix")
    with fetching(fetch):
        _list(kernels, family, entries, as_json)


def _list(kernels: Path | None, family: str | None, entries: bool, as_json: bool) -> None:
    source = _source(kernels)
    modules = modules_of(source).values()
    chosen = [module for module in modules if family in (None, module.family)]
    if family is not None and not chosen:
        shown = ", ".join(sorted({module.family for module in modules})) or "none"
        raise click.ClickException(f"{source.location} has no modules of {family}; it has {shown}")
    listed = [_described(source, module, entries) for module in chosen]
    if as_json:
        document = {"kernels": source.location, "version": source.version}
        output.print_json({**document, "modules": listed})
    else:
        _print(source, listed)


def _source(kernels: Path | None) -> KernelSource:
    """What to list: the place given, or the first of those in use that has modules."""
    if kernels is not None:
        return open_source(kernels)
    said = []
    for place in search.places():
        note = place.note or "no modules"
        if place.source is not None:
            try:
                if place.source.modules():
                    return place.source
            except FiFfiError as error:
                note = str(error)
        said.append(f"  {place.kind}: {note}")
    raise KernelNotFoundError(
        "no kernels in any of the places they come from:\n" + "\n".join(said) + "\n"
        f"`fi-ffi build --release {wanted_release()} norm` makes some; FI_FFI_KERNELS or --kernels "
        "names a directory or a flashinfer_jit_cache wheel; --fetch fetches FlashInfer's."
    )


def _described(source: KernelSource, module: Module, entries: bool) -> dict[str, Any]:
    parsed = module.parsed
    found: dict[str, Any] = {
        "module": module.name,
        "family": module.family,
        "dtypes": parsed.dtypes if parsed else {},
        "head_dims": parsed.head_dims if parsed else (),
        "backend": parsed.backend if parsed else "",
        "options": _options(parsed) if parsed else {},
        "ops": _ops(module),
        "size": module.size,
    }
    if entries:
        try:
            facts = facts_of(source.file(module.name))
            found["entries"] = facts.functions
            found["architectures"] = [code.name for code in facts.codes]
        except FiFfiError as error:  # one bad file hides no others
            found["error"] = str(error)
    return found


def _options(parsed: ModuleName) -> dict[str, Any]:
    """Parameters that are neither dtypes nor sizes of heads, where they are not as usual."""
    return {
        name: value
        for name, value in parsed.params.items()
        if name not in parsed.dtypes
        and not name.startswith(_OWN)
        and parsed.row.default(name, parsed.params) != value
    }


def _ops(module: Module) -> tuple[str, ...]:
    """The ops of the table whose rows name the module or its family."""
    return (*dict.fromkeys(r.name for r in ROWS if r.module in (module.name, module.family)),)


def _print(source: KernelSource, listed: Sequence[dict[str, Any]]) -> None:
    """A line for each module.  Not a table of `output`: names must stay whole, to be copied."""
    version = source.version or "of unknown release"
    click.echo(f"{len(listed)} modules of {source.location}, FlashInfer {version}")
    family_of = operator.itemgetter("family")
    for family, group in itertools.groupby(sorted(listed, key=family_of), family_of):
        modules = (*group,)
        ops = f"; ops: {', '.join(modules[0]['ops'])}" if modules[0]["ops"] else ""
        click.echo(f"{family}: {len(modules)}{ops}")
        rows = [_cells(entry) for entry in modules]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for entry, cells in zip(modules, rows, strict=True):
            pairs = zip(cells, widths, strict=True)
            line = "  ".join(cell.ljust(width) for cell, width in pairs if width)
            click.echo(f"  {line.rstrip()}")
            for line in _details(entry):
                click.echo(f"      {line}")


def _cells(entry: dict[str, Any]) -> Sequence[str]:
    return (
        _short_dtypes(entry["dtypes"]),
        "x".join(map(str, dict.fromkeys(entry["head_dims"]))),
        entry["backend"],
        ",".join(f"{name}={value}" for name, value in entry["options"].items()),
        "" if entry["size"] is None else f"{entry['size']:>11,}",
        entry["module"],
    )


def _details(entry: dict[str, Any]) -> Sequence[str]:
    facts = {
        "entries": entry.get("entries"),
        "compiled for": entry.get("architectures"),
        "unreadable": entry.get("error") and (entry["error"],),
    }
    return [f"{name}: {', '.join(found)}" for name, found in facts.items() if found]


def _short_dtypes(dtypes: dict[str, str]) -> str:
    """`f16` where all tensors have one dtype; indices are int32 but where it is said."""
    found = {name.replace("dtype", "").strip("_"): value for name, value in dtypes.items()}
    if found.get("idx") == "i32":
        del found["idx"]
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ",".join(f"{name}={value}" for name, value in found.items())


# Where each op can be called


def _matrix(
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
        answers = {name: {sm: _support(s) for sm, s in row.items()} for name, row in found.items()}
        cases = {issue.name: _case(issue, queries) for issue in KNOWN_ISSUES}
        output.print_json({**head, "ops": answers, "cases": cases})
        return
    columns = ("op", *(f"SM{sm}" for sm in SMS))
    rows = [(name, *(_SYMBOLS[s.status] for s in row.values())) for name, row in found.items()]
    output.print_table(f"FlashInfer {first.release}, {of}", columns, rows)
    click.echo("  ".join(f"{symbol}: {WORDS[status]}" for status, symbol in _SYMBOLS.items()))
    _explain(chosen, found)


def _explain(chosen: Sequence[Line], found: dict[str, dict[int, Support]]) -> None:
    """The reasons, where few lines were asked for; else how to ask for them."""
    if len(chosen) > _FEW:
        click.echo("--family OP has the reasons of an op; --json has all, and vLLM's cases.")
        return
    for name, row in found.items():
        said: dict[str, Any] = {}
        for sm, answer in row.items():
            # What builds it is for one GPU, and is in the JSON.
            said.setdefault(f"{WORDS[answer.status]}: {answer.reason}", []).append(f"SM{sm}")
        click.echo(f"{name}:")
        for text, sms in said.items():
            click.echo(f"  {', '.join(sms)}: {text}")


def _support(answer: Support) -> dict[str, Any]:
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
            sm: [{"op": a.op, **_support(a)} for a in issue.found(query)]
            for sm, query in queries.items()
        },
    }
