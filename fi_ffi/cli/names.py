"""Resolution of names on the command line: ops, modules, and entries."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import click

from fi_ffi.capability.judgement import Query, entry_row, gpu_runs, judge
from fi_ffi.capability.matrix import Line, lines
from fi_ffi.catalogue.ahead_of_time import listed_in
from fi_ffi.catalogue.families import FAMILIES
from fi_ffi.catalogue.requests import parse_request
from fi_ffi.errors import LoaderError, nearest
from fi_ffi.loader.distributions import split
from fi_ffi.loader.kernels import KernelSource
from fi_ffi.module_names import parse
from fi_ffi.ops.table import ROWS


@dataclass(frozen=True)
class ResolvedName:
    """A resolved name; `lines` answer questions about it.

    `module` is set for a module and for an entry, `symbol` for an entry. Both are "" for an op.
    """

    name: str
    lines: tuple[Line, ...]
    module: str = ""
    symbol: str = ""


def named(
    names: Sequence[str], sources: Sequence[KernelSource], release: str
) -> list[ResolvedName]:
    """Resolve names; an unknown one raises `UsageError` with the nearest names."""
    known = [*lines()]
    return [_named(name, known, sources, release) for name in dict.fromkeys(names)]


def _named(
    name: str, known: list[Line], sources: Sequence[KernelSource], release: str
) -> ResolvedName:
    own = tuple(line for line in known if line.op == name)
    if own:
        return ResolvedName(name, own)
    if ":" in name:
        return _of(name, _requested(name, known, release), "")
    if _is_module(name, sources, release):
        return _of(name, name, "")
    module, dot, symbol = name.rpartition(".")
    if dot and symbol and _is_module(module, sources, release):
        return _of(name, module, symbol)
    having = _entries().get(name, [])
    if len(having) == 1:
        return _of(name, having[0], name)
    if having:
        choice = " or ".join(f"{module}.{name}" for module in having)
        raise click.UsageError(f"{name!r} is an entry of several modules: name {choice}")
    everything = {line.op for line in known} | {*_modules(sources, release)} | {*_entries()}
    everything |= {f"{module}.{entry}" for entry, all_of in _entries().items() for module in all_of}
    ops = dict.fromkeys(line.op for line in known)
    hint = nearest(name, everything) or f"; the ops are {', '.join(ops)}"
    raise click.UsageError(f"no op, module or entry {name!r}{hint}")


def _of(name: str, module: str, symbol: str) -> ResolvedName:
    row = entry_row(module, symbol, ">=0" if split(module)[0] else ">=0.6.3")
    return ResolvedName(
        name, (Line(name, "", module, partial(judge, name, [row])),), module, symbol
    )


def _requested(name: str, known: list[Line], release: str) -> str:
    """Return the module of a family, or of a plan, with options: `batch_decode:dtype=bf16`."""
    head, _, options = name.partition(":")
    line = next((line for line in known if line.op == head), None)
    if line is not None and head not in FAMILIES:
        of = line.ask(Query.of(None, release)).module
        module = parse(of, release)
        if module is None or module.family not in FAMILIES:
            raise click.UsageError(f"{head} takes no options: name its module, such as {of}")
        head = module.family
    return parse_request(f"{head}:{options}").module_in(release)


def _is_module(name: str, sources: Sequence[KernelSource], release: str) -> bool:
    of_others = {row.module for row in ROWS if row.distribution}
    is_known = parse(name, release) is not None or name in of_others
    return is_known or name in _modules(sources, release)


def _modules(sources: Sequence[KernelSource], release: str) -> Iterator[str]:
    """Yield the modules of the sources, and the families that FlashInfer lists."""
    for source in sources:
        try:
            yield from source.modules()
        except LoaderError:  # reported to callers that need the module
            continue
    listed = listed_in(release)
    if listed is not None:
        yield from dict.fromkeys(grid.family for grid, _ in listed.modules)


def _entries() -> dict[str, list[str]]:
    """Return the modules of each known entry: entries of rows, and entries called on a GPU."""
    modules: dict[str, list[str]] = defaultdict(list)
    called = ((key, entry) for run in gpu_runs() for key, entry in sorted(run.entries))
    for key, entry in itertools.chain(((row.module, row.symbol) for row in ROWS), called):
        module = key.partition(":")[0]
        if module not in modules[entry]:
            modules[entry].append(module)
    return modules
