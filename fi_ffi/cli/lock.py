"""`fi-ffi lock`: keeping wheels.lock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from fi_ffi.cli.output import print_json, print_table
from fi_ffi.loader import lockfile
from fi_ffi.loader.lock import lock_path, read_lock, this_platform
from fi_ffi.loader.progress import reporter

_F = TypeVar("_F", bound=Callable[..., Any])


def _common(command: _F) -> _F:
    path = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--lock", "path", type=path, help="The lock; by default the one in use."),
    ):
        command = option(command)
    return command


_quiet = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")


@click.group()
def lock() -> None:
    """Keep wheels.lock, which pins every file that may be fetched.

    FI_FFI_LOCK names the lock in use, if it is not the one of the package.
    """


@lock.command()
@click.argument("source", metavar="FILE|URL")
@click.option("--release", help="FlashInfer's release, such as 0.6.13.")
@click.option("--cuda", metavar="TAG", help="CUDA tag, such as cu130.")
@click.option("--platform", help="Such as linux-x86_64.")
@click.option("--layout", type=click.Choice(["monolithic", "provider"]))
@click.option("--sm", help="The one architecture in it, such as sm90a.")
@click.option("--provenance", metavar="TEXT", help="Who vouches for the sha256.")
@click.option("--url", help="Where others find the file, if not on FlashInfer's release page.")
@_quiet
@_common
def add(
    source: str, path: Path | None, as_json: bool, quiet: bool, url: str | None, **given: str | None
) -> None:
    """Hash a kernel wheel, and pin it.

    What an option leaves open is taken from the wheel's name. A URL is read to its end.
    """
    where = path or lock_path()
    chosen = {key: value for key, value in given.items() if value}
    with reporter(quiet) as report:
        done = lockfile.add(where, source, chosen, url=url, report=report)
    if as_json:
        print_json({"lock": str(where), "updated": done.updated, "entry": done.entry})
        return
    click.echo(f"{where}: {'updated' if done.updated else 'added'} {done.entry['file']}")
    for key, value in done.entry.items():
        click.echo(f"  {key:<14}{value}")


@lock.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="The entries of every platform.")
@click.option("--full", is_flag=True, help="Fetch the files and check their sha256.")
@_quiet
@_common
def verify(
    names: tuple[str, ...],
    everything: bool,
    full: bool,
    path: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare entries with what their addresses have now.

    A NAME is a file, an address, a release or a package; by default every entry for
    this platform. Sizes and, where the server has ranges, RECORDs are compared. The
    exit status is 1 where anything differs, or where nothing could be reached.
    """
    where = path or lock_path()
    platform = None if everything else this_platform()
    chosen = lockfile.entries(read_lock(where), names, platform=platform)
    with reporter(quiet) as report:
        done = [lockfile.verify(entry, full=full, report=report) for entry in chosen]
    if as_json:
        print_json({"lock": str(where), "files": [asdict(each) for each in done]})
    else:
        rows = [(d.status, d.size, d.record, d.sha256, d.file, d.note) for d in done]
        columns = ("status", "size", "RECORD", "sha256", "file", "note")
        print_table(f"{where}", columns, rows)
    if any(d.status == "fail" for d in done) or all(d.status != "ok" for d in done):
        sys.exit(1)


@lock.command("pin-record")
@click.argument("names", nargs=-1, required=True, metavar="NAME|URL...")
@_common
def pin_record(names: tuple[str, ...], path: Path | None, as_json: bool) -> None:
    """Pin the RECORD of entries, by fetching their directory and RECORD alone."""
    where = path or lock_path()
    chosen = lockfile.entries(read_lock(where), names)
    done = [lockfile.pin_record(where, entry) for entry in chosen]
    if as_json:
        print_json({"lock": str(where), "files": [asdict(each) for each in done]})
        return
    for each in done:
        click.echo(f"{each.file}: {'pinned' if each.changed else 'already pinned'}")
        click.echo(f"  record-sha256 {each.record_sha256}")
        if each.trust != "file-verified" and each.changed:
            click.echo(
                "  This trusts what the server sent today: `fi-ffi lock verify --full "
                f"{each.file}` checks the whole file against its sha256."
            )
