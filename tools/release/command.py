"""`python3 -m tools.release`: what a FlashInfer release changed, and which rows it affects."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import click

from fi_ffi.cli.group import CommandGroup
from fi_ffi.cli.output import print_json, say
from fi_ffi.loader.fetch.progress import doing
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.loader.uris import version_of
from fi_ffi.ops.call.releases import OLDEST
from tools.release.compare import Change, Difference, changes, compare, family_of
from tools.release.declared import (
    ABSENT,
    FITS,
    UNCOVERED,
    WRONG,
    Declared,
    declared,
    why_refused,
    without_row,
)
from tools.release.exports import Function
from tools.release.generators import Generator
from tools.release.interface import Interface, Key
from tools.release.wheels import open_release, published

_WIDTH = 120  # templates with more characters in total are abbreviated


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare and record the sources of FlashInfer's releases."""


@dataclass(frozen=True)
class Touched:
    """An entry with a row, and its state in both releases.

    `before` and `after` are answers of `tools.release.declared`. `rows` lists the releases that
    each of the entry's forms covers.
    """

    entry: Declared
    before: str
    after: str
    changes: tuple[Change, ...]
    rows: tuple[str, ...]
    # Why the entry has no row for the new release, if that is on purpose.
    why: str

    @property
    def is_touched(self) -> bool:
        """Whether the entry's row needs attention, or already differs between the releases."""
        untouched = (self.before, self.after) in ((FITS, FITS), (ABSENT, ABSENT))
        return bool(self.changes) or not untouched


def touched(old: Interface, new: Interface) -> list[Touched]:
    """Return every entry that has a row, with its state in both releases."""
    found = []
    for entry in declared():
        before, after = entry.function(old), entry.function(new)
        changed = tuple(changes(before, after)) if before and after else ()
        rows = tuple(form.releases for form in entry.forms)
        was, is_ = entry.answer(old), entry.answer(new)
        why = why_refused(entry.name, new.release) if is_ == UNCOVERED else ""
        found.append(Touched(entry, was, is_, changed, rows, why))
    return found


@main.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def diff(old: str, new: str, as_json: bool) -> None:
    """Compare two releases, and list the ops that change.

    OLD and NEW are releases of flashinfer-python, which pip fetches, or paths of its wheels.
    Exits with 1 if an op claims to support one of the two, and its binding there is gone or
    takes other arguments.
    """
    interfaces = []
    for each in (old, new):
        with doing(f"reading FlashInfer {each}"):
            interfaces.append(open_release(each).interface())
    difference = compare(*interfaces)
    rows = touched(difference.old, difference.new)
    if as_json:
        print_json(document(difference, rows))
    else:
        for line in text(difference, rows):
            say(line)
    if any({each.before, each.after} & {*WRONG} for each in rows):
        sys.exit(1)


@main.command()
@click.argument("releases", nargs=-1, metavar="[RELEASE]...")
@click.option("--modules", is_flag=True, help="Run the generators too, for the names of modules.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a file is stale.")
@click.option("--json", "as_json", is_flag=True, help="Print the changed files as JSON.")
@click.option(
    "--to",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    help="The checkout whose records are written (default: this folder).",
)
@click.option(
    "--build-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the generators' output (default: one in the cache).",
)
def record(
    releases: tuple[str, ...],
    modules: bool,
    check: bool,
    as_json: bool,
    root: Path,
    build_dir: Path | None,
) -> None:
    """Record what releases declare, in a checkout of fi_ffi.

    A RELEASE is read from its wheel; the default is every release that pip finds and fi_ffi
    supports. --modules also runs the release's generators, in an environment like that of
    `fi-ffi build`, and records the names and exports of its modules. That takes minutes, and no
    GPU.
    """
    # builds environments, which diff does not need
    from tools.release.record import recorded

    oldest = version_of(OLDEST)
    chosen = releases or [each for each in published() if version_of(each) >= oldest]
    files = recorded(
        root, chosen, the_lock().default_release, partial(say, err=True),
        with_generators=modules, build_dir=build_dir,
    )  # fmt: skip
    stale = [path for path, content in files.items() if not _has(path, content)]
    for path in stale:
        if not check:
            path.write_text(files[path])
        if not as_json:
            say(f"{path}: {'stale' if check else 'written'}")
    if as_json:
        print_json([str(path) for path in stale])
    if check and stale:
        sys.exit(1)


def _has(path: Path, content: str) -> bool:
    return path.exists() and path.read_text() == content


def text(difference: Difference, rows: Sequence[Touched]) -> Iterator[str]:
    """Yield the lines of the report."""
    old, new = difference.old, difference.new
    yield f"FlashInfer {old.release} -> {new.release}"
    yield ""
    yield from _summary(difference, rows)
    yield from _section(f"Rows touched ({sum(each.is_touched for each in rows)})", _rows(rows))
    yield from _section(
        f"Signatures that changed ({len(difference.changed)})",
        (
            line
            for key, found in difference.changed.items()
            for line in _changed(key, old, new, found)
        ),
    )
    yield from _section(
        f"Exports that moved ({len(difference.moved)})",
        (
            line
            for moved in difference.moved
            for line in (f"{moved.old} -> {moved.new}", *(f"    {c}" for c in moved.changes))
        ),
    )
    yield from _section(
        f"Exports of generated sources that changed ({len(difference.several)})",
        (f"{key}: {len(old.exports[key])} -> {len(new.exports[key])} signatures"
         for key in difference.several),
    )  # fmt: skip
    yield from _section(f"Exports that went ({len(difference.gone)})", _by_source(difference.gone))
    yield from _section(f"Exports that came ({len(difference.came)})", _by_source(difference.came))
    rest = [key for key in without_row(new) if key in old.exports]
    yield from _section(f"Exports of both without a row here ({len(rest)})", _by_source(rest))
    yield from _section(f"Modules ({len(difference.families)} families)", _families(difference))
    yield from _section("Generators", _generators(difference))
    unread = [(i.release, key, why) for i in (old, new) for key, why in i.unread.items()]
    yield from _section(
        f"Exports whose parameters cannot be read ({len(unread)})",
        (f"{of}: {key}: {why}" for of, key, why in unread),
    )


def _summary(difference: Difference, rows: Sequence[Touched]) -> Iterator[str]:
    old, new = difference.old, difference.new
    for each, answers in ((old, [r.before for r in rows]), (new, [r.after for r in rows])):
        counted = ", ".join(f"{n} {word}" for word, n in sorted(Counter(answers).items()))
        yield (
            f"{each.release}: {len(each.names)} names exported in {each.files} files of csrc, "
            f"{len(each.exports)} entries; of {len(rows)} entries with a row here, {counted}"
        )
    yield (
        f"{difference.common} entries in both, {len(difference.changed)} of them with other "
        f"parameters; {len(difference.came)} came, {len(difference.gone)} went, "
        f"{len(difference.moved)} moved; {len(without_row(new))} of {new.release} without a row"
    )


def _section(title: str, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    yield f"\n{title}\n{'-' * len(title)}"
    yield from lines


def _rows(rows: Sequence[Touched]) -> Iterator[str]:
    for each in rows:
        if each.is_touched:
            yield f"{each.entry.name}: {each.before} -> {each.after}  [{', '.join(each.rows)}]"
            if each.why:
                yield f"    no row on purpose: {each.why}"
            yield from (f"    {change}" for change in each.changes)


def _changed(key: Key, old: Interface, new: Interface, found: Sequence[Change]) -> Iterator[str]:
    counts = (len(i.exports[key][0].names) for i in (old, new))
    yield f"{key}: {' -> '.join(map(str, counts))} parameters"
    yield from (f"    {change}" for change in found)


def _by_source(keys: Sequence[Key]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for key in keys:
        where = f"{key.source}, {key.variant}" if key.variant else key.source
        found.setdefault(where, []).append(key.name)
    for where, names in found.items():
        yield f"{where}: {', '.join(names)}"


def _families(difference: Difference) -> Iterator[str]:
    for each in difference.families:
        yield f"{each.family}{f': {each.note}' if each.note else ''}"
        for what, before, after in (
            ("name", each.old_name, each.new_name),
            ("generator", each.old_generator, each.new_generator),
        ):
            if before != after:
                yield f"    {what} {_shorter(before, after)}"


def _generators(difference: Difference) -> Iterator[str]:
    for name, made in difference.generators_gone.items():
        yield f"went: {name}{_made(made)}"
    for name, made in difference.generators_came.items():
        yield f"came: {name}{_made(made)}"
    for name, (before, after) in difference.generators_changed.items():
        family = family_of(name)
        yield f"changed: {name}{f', of {family}' if family else ''}"
        if before.parameters != after.parameters:
            more = [f"+{p}" for p in after.parameters if p not in before.parameters]
            less = [f"-{p}" for p in before.parameters if p not in after.parameters]
            yield f"    parameters {' '.join([*more, *less]) or 'in another order'}"
        if before.names != after.names:
            names = (" or ".join(made.names) or "not written out" for made in (before, after))
            yield f"    names {_shorter(*names)}"


_PIECES = re.compile(r"\{.*?\}|[^{_]+|_")


def _shorter(before: str, after: str) -> str:
    """Return two name templates; of two long ones, only the parts that differ."""
    if len(before) + len(after) < _WIDTH or not (before and after):
        return f"{before or 'none'} -> {after or 'none'}"
    a, b = _PIECES.findall(before), _PIECES.findall(after)
    found = [
        f"{''.join(a[i:i_end]) or 'nothing'} -> {''.join(b[j:j_end]) or 'nothing'}"
        for tag, i, i_end, j, j_end in SequenceMatcher(None, a, b, False).get_opcodes()
        if tag != "equal"
    ]
    return f"in {a[0]}...: {', '.join(found)}"


def _made(generator: Generator) -> str:
    return f" makes {' or '.join(generator.names)}" if generator.names else ""


def _function(function: Function | None) -> dict[str, Any] | None:
    if function is None:
        return None
    pairs = zip(function.names, function.signature.params, strict=True)
    return {"params": [[*pair] for pair in pairs], "result": function.signature.result}


def _key(key: Key) -> dict[str, str]:
    return key._asdict()


def document(difference: Difference, rows: Sequence[Touched]) -> dict[str, Any]:
    """Return the report as a JSON document."""
    old, new = difference.old, difference.new

    def both(key: Key) -> dict[str, Any]:
        return {"old": _function(old.exports[key][0]), "new": _function(new.exports[key][0])}

    def made(found: Mapping[str, Generator]) -> dict[str, Any]:
        return {name: generator._asdict() for name, generator in found.items()}

    return {
        "old": _counts(old), "new": _counts(new), "common": difference.common,
        "rows": [
            {
                "name": each.entry.name, "module": each.entry.module, **_key(each.entry.key)
                | {"entry": each.entry.key.name},
                "before": each.before, "after": each.after, "touched": each.is_touched,
                "why": each.why,
                "releases": [*each.rows], "changes": [asdict(change) for change in each.changes],
                "old": _function(each.entry.function(old)),
                "new": _function(each.entry.function(new)),
            }
            for each in rows
        ],
        "changed": [
            {**_key(key), "changes": [asdict(change) for change in found], **both(key)}
            for key, found in difference.changed.items()
        ],
        "moved": [
            {"old": _key(m.old), "new": _key(m.new), "changes": [asdict(c) for c in m.changes]}
            for m in difference.moved
        ],
        "several": [_key(key) for key in difference.several],
        "gone": [_key(key) for key in difference.gone],
        "came": [_key(key) | {"new": [_function(f) for f in new.exports.get(key, ())]}
                 for key in difference.came],
        "families": [asdict(family) for family in difference.families],
        "generators": {
            "gone": made(difference.generators_gone), "came": made(difference.generators_came),
            "changed": {
                name: {"old": a._asdict(), "new": b._asdict()}
                for name, (a, b) in difference.generators_changed.items()
            },
        },
        "without_row": [_key(key) for key in without_row(new)],
        "unread": [_key(key) | {"release": i.release, "why": why}
                   for i in (old, new) for key, why in i.unread.items()],
    }  # fmt: skip


def _counts(interface: Interface) -> dict[str, Any]:
    return {
        "release": interface.release, "names": len(interface.names), "files": interface.files,
        "entries": len(interface.exports),
    }  # fmt: skip
