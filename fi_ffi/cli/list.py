"""`fi-ffi list`: the modules of an artifact, and the ops they serve.

In this module the command hides the builtin `list`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fi_ffi.capability.judgement import Query
from fi_ffi.capability.known_issues import KNOWN_ISSUES, KnownIssue
from fi_ffi.capability.matrix import SMS, Line, lines
from fi_ffi.catalogue.modules import ArtifactModule, modules_of
from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError, KernelNotFoundError, nearest
from fi_ffi.loader import search
from fi_ffi.loader.fetch import progress
from fi_ffi.loader.kernels import KernelSource, facts_of, open_source
from fi_ffi.loader.permission import fetching
from fi_ffi.loader.search import wanted_release
from fi_ffi.module_names import ModuleName
from fi_ffi.ops.call.support import WORDS, Support
from fi_ffi.ops.table import ROWS

# Parameters that have their own column.
_OWN = ("backend", "head_dim")
# Symbols of the matrix, by status.
_SYMBOLS = {"run": "run", "built": "built", "refused": "-", "missing": "lacks", "unknown": "?"}
_FEW = 4  # most lines of the matrix whose reasons are printed


@click.command()
@click.option(
    "--kernels",
    type=click.Path(exists=True, path_type=Path),
    help="Directory or wheel of kernels (default: the places that calls search, in order).",
)
@click.option("--family", help="Only modules of this family, such as batch_prefill or norm.")
@click.option("--fetch", is_flag=True, help="Fetch FlashInfer's kernels first.")
@click.option("--entries", is_flag=True, help="Open modules and list their functions and GPUs too.")
@click.option("--matrix", is_flag=True, help="Show on which GPUs each op can be called.")
@click.option("--release", help="With --matrix: the wheels of a release, such as 0.6.13.")
@click.option("--cuda", help="With --matrix: the wheels of a CUDA tag, such as cu130.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list(
    kernels: Path | None,
    family: str | None,
    fetch: bool,
    entries: bool,
    as_json: bool,
    matrix: bool,
    release: str | None,
    cuda: str | None,
) -> None:
    """List kernel modules: family, dtypes, head sizes, backend, and the ops that use them.

    The names of modules have all of this: only --entries opens files, and only --fetch fetches.
    --matrix shows the kernels in use, the pinned wheel included. It shows FlashInfer's published
    wheels if you name a release or a CUDA tag.
    """
    if matrix:
        _matrix(None if kernels is None else str(kernels), release, cuda, family, as_json)
        return
    if release or cuda:
        raise click.UsageError("--release and --cuda need --matrix")
    with fetching(fetch):
        _list(kernels, family, entries, as_json)


def _list(kernels: Path | None, family: str | None, entries: bool, as_json: bool) -> None:
    with progress.doing("looking for kernels"):
        places, notes = _places(kernels)
    first = places[0][0]
    families = {module.family for _, modules in places for module in modules}
    chosen = [
        (source, module)
        for source, modules in places
        for module in modules
        if family in (None, module.family)
    ]
    if family is not None and not chosen:
        every = ", ".join(sorted(families)) or "none"
        shown = f"; it has {every}{nearest(family, families)}"
        raise output.Failure(f"{first.location} has no modules of {family}{shown}")
    listed = []
    with progress.counter("modules", len(chosen), quiet=not entries, lines=False) as count:
        for source, module in chosen:
            count(module.name)
            listed.append(_described(source, module, entries))
    if as_json:
        document = {"kernels": first.location, "version": first.version, "others": notes}
        output.print_json({**document, "modules": listed})
        return
    for source, _ in places:
        of = [entry for entry in listed if entry["kernels"] == source.location]
        if of:
            _print(source, of)
    for note in notes:
        output.say(note)


def _places(
    kernels: Path | None,
) -> tuple[Sequence[tuple[KernelSource, Sequence[ArtifactModule]]], Sequence[str]]:
    """Return the sources, each with the modules that a call takes from it, and notes on others.

    A call takes a module from the first place that has it. Places that have it for other GPUs are
    listed with it too.
    """
    if kernels is not None:
        source = open_source(kernels)
        return [(source, (*modules_of(source).values(),))], []
    places, notes, reasons = [], [], []
    for place in search.places():
        note = place.note or "no modules"
        if place.source is not None:
            try:
                if modules := modules_of(place.source):
                    places.append((place.source, (*modules.values(),)))
                    continue
            except FiFfiError as error:
                note = str(error)
                notes.append(f"{place.kind}: {place.source.location}: {note}")
        reasons.append(f"  {place.kind}: {note}")
    if places:
        return places, notes
    raise KernelNotFoundError(
        "no kernels in any of the places they come from:\n" + "\n".join(reasons) + "\n"
        f"`fi-ffi build --release {wanted_release()} norm` makes some; FI_FFI_KERNELS or --kernels "
        "names a directory or a flashinfer_jit_cache wheel; --fetch fetches FlashInfer's."
    )


def _described(source: KernelSource, module: ArtifactModule, entries: bool) -> dict[str, Any]:
    parsed = module.parsed
    document: dict[str, Any] = {
        "module": module.name,
        "kernels": source.location,
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
            document["entries"] = facts.functions
            document["architectures"] = [code.name for code in facts.codes]
        except FiFfiError as error:  # one bad file must not hide the others
            document["error"] = str(error)
    return document


def _options(parsed: ModuleName) -> dict[str, Any]:
    """Return the parameters other than dtypes and head sizes that differ from their defaults."""
    return {
        name: value
        for name, value in parsed.params.items()
        if name not in parsed.dtypes
        and not name.startswith(_OWN)
        and parsed.row.default(name, parsed.params) != value
    }


def _ops(module: ArtifactModule) -> tuple[str, ...]:
    """Return the ops whose rows name the module or its family."""
    return (*dict.fromkeys(r.name for r in ROWS if r.module in (module.name, module.family)),)


def _print(source: KernelSource, listed: Sequence[dict[str, Any]]) -> None:
    """Print a line for each module, not a table: names must stay whole for copying."""
    version = source.version or "of unknown release"
    many = output.counted(len(listed), "module")
    output.say(f"{many} of {source.location}, FlashInfer {version}")
    family_of = operator.itemgetter("family")
    for family, group in itertools.groupby(sorted(listed, key=family_of), family_of):
        modules = (*group,)
        ops = f"; ops: {', '.join(modules[0]['ops'])}" if modules[0]["ops"] else ""
        output.say(f"{family}: {len(modules)}{ops}")
        rows = [_cells(entry) for entry in modules]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for entry, cells in zip(modules, rows, strict=True):
            pairs = zip(cells, widths, strict=True)
            line = "  ".join(cell.ljust(width) for cell, width in pairs if width)
            output.say(f"  {line.rstrip()}")
            for line in _details(entry):
                output.say(f"      {line}")


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
    return [f"{name}: {', '.join(values)}" for name, values in facts.items() if values]


def _short_dtypes(dtypes: dict[str, str]) -> str:
    """Return `f16` if all tensors have one dtype; int32 indices are omitted."""
    short = {name.replace("dtype", "").strip("_"): value for name, value in dtypes.items()}
    if short.get("idx") == "i32":
        del short["idx"]
    if len(set(short.values())) == 1:
        return next(iter(short.values()))
    return ",".join(f"{name}={value}" for name, value in short.items())


# The matrix


def _matrix(
    kernels: str | None, release: str | None, cuda: str | None, wanted: str | None, as_json: bool
) -> None:
    """Print the matrix; `wanted` selects an op or a family."""
    chosen = [line for line in lines() if wanted in (None, line.op, line.family)]
    if not chosen:
        ops = dict.fromkeys(line.op for line in lines())
        known = {*ops, *(line.family for line in lines())}
        shown = nearest(str(wanted), known) or f"; there are {', '.join(ops)}"
        raise output.Failure(f"no op or family {wanted!r}{shown}")
    queries = {sm: Query.of(sm, release, cuda, None, kernels) for sm in SMS}
    supports = {}
    with progress.counter("ops", len(chosen), lines=False) as count:
        for line in chosen:
            count(line.name)
            supports[line.name] = {sm: line.ask(query) for sm, query in queries.items()}
    first = next(iter(queries.values()))
    of = ", ".join(s.location for s in first.sources) or f"the {first.cuda} wheels"
    head = {"kernels": of, "release": first.release, "cuda": first.cuda}
    if as_json:
        answers = {
            name: {sm: _support(s) for sm, s in row.items()} for name, row in supports.items()
        }
        cases = {issue.name: _case(issue, queries) for issue in KNOWN_ISSUES}
        output.print_json({**head, "ops": answers, "cases": cases})
        return
    columns = ("op", *(f"SM{sm}" for sm in SMS))
    rows = [(name, *(_SYMBOLS[s.status] for s in row.values())) for name, row in supports.items()]
    output.print_table(f"FlashInfer {first.release}, {of}", columns, rows)
    output.say("  ".join(f"{symbol}: {WORDS[status]}" for status, symbol in _SYMBOLS.items()))
    _explain(chosen, supports)


def _explain(chosen: Sequence[Line], supports: dict[str, dict[int, Support]]) -> None:
    """Print the reasons for a few lines; for more lines, print how to ask for them."""
    if len(chosen) > _FEW:
        output.say("--family OP shows the reasons for an op, --json all reasons and vLLM's cases.")
        return
    for name, row in supports.items():
        reasons: dict[str, Any] = {}
        for sm, answer in row.items():
            # The build commands differ by GPU and are only in the JSON.
            reasons.setdefault(f"{WORDS[answer.status]}: {answer.reason}", []).append(f"SM{sm}")
        output.say(f"{name}:")
        for text, sms in reasons.items():
            output.say(f"  {', '.join(sms)}: {text}")


def _support(answer: Support) -> dict[str, Any]:
    return {
        "status": answer.status,
        "works": bool(answer),
        "reason": answer.reason,
        "module": answer.module,
        "place": answer.place,
        "is_here": answer.is_here,
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
