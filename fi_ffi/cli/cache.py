"""`fi-ffi cache`: lists, prunes and verifies the cache."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import click

from fi_ffi.cli import output, upkeep
from fi_ffi.cli.group import NearNames
from fi_ffi.cli.upkeep import Item, items
from fi_ffi.loader import trust
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.fetch import progress

_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(cls=NearNames)
def cache() -> None:
    """List, prune and verify the cache of kernels and builds.

    FI_FFI_CACHE_DIR names the cache's directory; the default is in the user's cache directory.
    """


@cache.command("list")
@_as_json
def list_(as_json: bool) -> None:
    """List cached files, wheels and build folders."""
    root = cache_root()
    groups = {
        "objects": items(root, "object"),
        "wheels": items(root, "wheel"),
        "builds": items(root, "build"),
        "downloads": items(root, "download"),
        "leftovers": items(root, "leftover"),
    }
    total = upkeep.total(root)
    if as_json:
        documents = {name: [*map(_document, items)] for name, items in groups.items()}
        output.print_json({"root": str(root), **documents, "total": total})
        return
    files = [(i.name, f"{i.size:,}", str(i.sha256)[:12], _day(i)) for i in groups["objects"]]
    output.say(f"{output.counted(len(files), 'file')} in {root}")
    _print_table(("file", "bytes", "sha256", "last use"), files)
    others = {"wheel": "wheels", "build": "builds", "unfinished download": "downloads"}
    for kind, group in others.items():
        members = groups[group]
        rows = [(item.name, f"{item.size:,}", _day(item)) for item in members]
        _print_table((kind, "bytes", "last written"), rows)
    left = groups["leftovers"]
    if left:
        freed = f"{sum(item.size for item in left):,} bytes"
        many = output.counted(len(left), "leftover")
        output.say(f"{many} of ended processes, {freed}: `fi-ffi cache prune`")
    output.say(f"total: {total:,} bytes")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        output.print_table("", columns, rows, numbers=["bytes"])


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Remove all that was fetched or built.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Remove files and builds that were not used for DAYS days.",
)
@click.option("--builds", is_flag=True, help="Remove the folders that `fi-ffi build` works in.")
@click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be removed.")
@_as_json
def prune(
    everything: bool, older_than: float | None, builds: bool, dry_run: bool, as_json: bool
) -> None:
    """Remove files from the cache.

    Without options, only the leftovers of killed processes are removed. Calls fetch removed
    files again, and builds make them again. Wheels in the cache's `wheels` folder stay. There is
    no question before files are removed.
    """
    if everything + builds + (older_than is not None) > 1:
        raise click.UsageError("--all, --older-than and --builds exclude each other")
    root = cache_root()
    if os.path.isdir(root):
        trust.check_root(root)
    wanted = items(root, "leftover")
    if builds:
        wanted += items(root, "build")
    if everything or older_than is not None:
        kinds: tuple[upkeep.Kind, ...] = ("object", "download", "note", "build")
        limit = time.time() - (older_than or 0) * 86400
        candidates = (item for kind in kinds for item in items(root, kind))
        wanted += [item for item in candidates if everything or item.last_use <= limit]
    removed, kept = upkeep.prune(wanted, root, dry_run=dry_run)
    freed = sum(item.size for item in removed)
    if as_json:
        documents = [_document(item) | {"reason": reason} for item, reason in kept]
        document = {"root": str(root), "dry_run": dry_run, "removed": [*map(_document, removed)]}
        output.print_json(document | {"kept": documents, "freed": freed})
    else:
        verb = "would remove" if dry_run else "removed"
        for item in removed:
            output.say(f"{verb} {item.kind} {item.name} ({item.size:,} bytes)")
        for item, reason in kept:
            output.say(f"kept {item.kind} {item.name}: {reason}", err=True)
        output.say(f"{freed:,} bytes {'would be freed' if dry_run else 'freed'} in {root}")
    if kept:
        sys.exit(1)


@cache.command()
@click.option("--repair", is_flag=True, help="Remove the damaged files.")
@_as_json
def verify(repair: bool, as_json: bool) -> None:
    """Check the hash of every cached file.

    Exits with 1 if a file is damaged or not safe to load, and was not removed.
    """
    root = cache_root()
    verdicts = []
    with progress.doing("hashing") as show:
        for verdict in upkeep.verify(root, repair=repair):
            verdicts.append(verdict)
            show(f"hashed {output.counted(len(verdicts), 'file')}, {verdict.item.name} the last")
    bad = [verdict for verdict in verdicts if verdict.problem]
    if as_json:
        documents = [
            _document(verdict.item) | {"problem": verdict.problem, "removed": verdict.removed}
            for verdict in bad
        ]
        output.print_json({"root": str(root), "verified": len(verdicts), "bad": documents})
    else:
        for verdict in bad:
            fate = "removed" if verdict.removed else "still there; --repair removes it"
            output.say(f"{verdict.item.path}: {verdict.problem} ({fate})")
        hashed = output.counted(len(verdicts), "file")
        output.say(f"{hashed} hashed in {root}, {len(bad)} bad")
    if not all(verdict.removed for verdict in bad):
        sys.exit(1)


def _day(item: Item) -> str:
    return f"{datetime.fromtimestamp(item.last_use):%Y-%m-%d %H:%M}"


def _document(item: Item) -> dict[str, Any]:
    used = datetime.fromtimestamp(item.last_use, timezone.utc)
    document = asdict(item) | {"path": str(item.path), "last_use": f"{used:%Y-%m-%dT%H:%M:%SZ}"}
    return {key: value for key, value in document.items() if value is not None}
