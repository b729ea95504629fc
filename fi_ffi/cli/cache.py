"""`fi-ffi cache`: what lies in the cache, and keeping it small and whole."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import click

from fi_ffi.cli import output
from fi_ffi.loader import trust, upkeep
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.upkeep import Item, items

_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group()
def cache() -> None:
    """List, prune and verify the cache of kernels and builds.

    It lies in the user's cache directory, or where FI_FFI_CACHE_DIR says.
    """


@cache.command("list")
@_as_json
def list_(as_json: bool) -> None:
    """List the cached files and the build folders, with sizes and last use."""
    root = cache_root()
    groups = {
        "objects": items(root, "object"),
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
    click.echo(f"{len(files)} files in {root}")
    _print_table(("file", "bytes", "sha256", "last use"), files)
    for kind, found in (("build", groups["builds"]), ("unfinished download", groups["downloads"])):
        rows = [(item.name, f"{item.size:,}", _day(item)) for item in found]
        _print_table((kind, "bytes", "last written"), rows)
    left = groups["leftovers"]
    if left:
        freed = f"{sum(item.size for item in left):,} bytes"
        click.echo(f"{len(left)} leftovers of ended processes, {freed}: `fi-ffi cache prune`")
    click.echo(f"total: {total:,} bytes")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        output.print_table("", columns, rows, numbers=["bytes"])


@cache.command()
@click.option("--all", "everything", is_flag=True, help="All that was fetched or built.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Files and builds that were not used in so many days.",
)
@click.option("--builds", is_flag=True, help="The folders that `fi-ffi build` works in.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_as_json
def prune(
    everything: bool, older_than: float | None, builds: bool, dry_run: bool, as_json: bool
) -> None:
    """Remove what is not needed, and say how much that freed.

    Without an option that names more, only what killed processes left. Whatever is
    removed is made or fetched again when it is needed; wheels that you put into the
    cache's `wheels` folder stay. Nothing is asked.
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
        found = (item for kind in kinds for item in items(root, kind))
        wanted += [item for item in found if everything or item.last_use <= limit]
    removed, kept = upkeep.prune(wanted, root, dry_run=dry_run)
    freed = sum(item.size for item in removed)
    if as_json:
        documents = [_document(item) | {"reason": reason} for item, reason in kept]
        document = {"root": str(root), "dry_run": dry_run, "removed": [*map(_document, removed)]}
        output.print_json(document | {"kept": documents, "freed": freed})
    else:
        verb = "would remove" if dry_run else "removed"
        for item in removed:
            click.echo(f"{verb} {item.kind} {item.name} ({item.size:,} bytes)")
        for item, reason in kept:
            click.echo(f"kept {item.kind} {item.name}: {reason}", err=True)
        click.echo(f"{freed:,} bytes {'would be freed' if dry_run else 'freed'} in {root}")
    if kept:
        sys.exit(1)


@cache.command()
@click.option("--repair", is_flag=True, help="Remove the damaged files.")
@_as_json
def verify(repair: bool, as_json: bool) -> None:
    """Hash every cached file again.

    Exits with 1 where one is damaged, or is not safe to load, and was not removed.
    """
    root = cache_root()
    verdicts = [*upkeep.verify(root, repair=repair)]
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
            click.echo(f"{verdict.item.path}: {verdict.problem} ({fate})")
        click.echo(f"{len(verdicts)} files hashed in {root}, {len(bad)} bad")
    if not all(verdict.removed for verdict in bad):
        sys.exit(1)


def _day(item: Item) -> str:
    return f"{datetime.fromtimestamp(item.last_use):%Y-%m-%d %H:%M}"


def _document(item: Item) -> dict[str, Any]:
    used = datetime.fromtimestamp(item.last_use, timezone.utc)
    document = asdict(item) | {"path": str(item.path), "last_use": f"{used:%Y-%m-%dT%H:%M:%SZ}"}
    return {key: value for key, value in document.items() if value is not None}
