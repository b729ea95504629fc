"""Edit wheels.lock: `add FILE|URL` pins a wheel, `pin-record NAME` the RECORD of one.

Comments and order of the file stay as they are, and it is never half written.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
import tomlkit  # noqa: E402
from tomlkit.exceptions import TOMLKitError  # noqa: E402

from fi_ffi.cli.lock import entries  # noqa: E402
from fi_ffi.errors import ArgumentError, ArtifactError, FiFfiError, LoaderError  # noqa: E402
from fi_ffi.loader import cache  # noqa: E402
from fi_ffi.loader.fetch.download import Reporter, fetch_file  # noqa: E402
from fi_ffi.loader.fetch.pinning import append, describe, write  # noqa: E402
from fi_ffi.loader.fetch.progress import reporter  # noqa: E402
from fi_ffi.loader.fetch.remote import RemoteWheel  # noqa: E402
from fi_ffi.loader.fetch.urls import check_url, is_file_url, redact  # noqa: E402
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel, read_lock  # noqa: E402
from fi_ffi.loader.lock import lock_path  # noqa: E402
from fi_ffi.loader.machine import sass_named  # noqa: E402
from fi_ffi.loader.wheel import Wheel  # noqa: E402


@dataclass(frozen=True)
class Added:
    """What `add_wheel` did: the entry's keys and values, and whether it was there before."""

    entry: dict[str, Any]
    updated: bool


@dataclass(frozen=True)
class Pinned:
    """A RECORD's sha256, now in the lock, and what vouches for it."""

    file: str
    record_sha256: str
    trust: str
    changed: bool


def add_wheel(
    path: Path,
    source: str,
    given: dict[str, str],
    *,
    url: str | None = None,
    report: Reporter | None = None,
) -> Added:
    """Hash the wheel at a path or address, and enter it into the lock at `path`.

    `given` are keys that win over what the name tells.  A file that is there already,
    with the same sha256, gets what its entry lacks.
    """
    where, sha256, address = _take(source, report)
    wheel = Wheel(where)
    found: dict[str, Any] = describe(where.name) | given
    if "sm" in given:
        found["sm"] = sass_named(given["sm"]).name.replace("_", "")
    missing = {"release", "cuda", "platform", "layout"} - found.keys()
    if missing:
        options = " ".join(f"--{key}" for key in sorted(missing))
        raise ArgumentError("add", options, got=where.name, expected="values: the name has none")
    keys = ("release", "cuda", "platform", "layout", "sm")
    entry = {key: found[key] for key in keys if key in found} | {
        "file": where.name,
        "sha256": sha256,
        "size": where.stat().st_size,
        "record-sha256": wheel.record_sha256,
        "provenance": found.get("provenance") or f"hashed here, {_today()}",
    }
    lock = read_lock(path)
    _choose_url(path, entry, where, url or address)
    same = next((file for file in lock.kernels if file.file == where.name), None)
    if same is None:
        append(path, entry)
        return Added(entry, False)
    if same.sha256 != sha256:
        raise ArtifactError(
            f"{where.name} is pinned with sha256 {same.sha256}, and this file has {sha256}"
        )
    old = same.provenance.replace("not verified here", f"verified here, {_today()}")
    entry["provenance"] = found.get("provenance") or old
    _update(path, where.name, entry)
    return Added(entry, True)


def _take(source: str, report: Reporter | None) -> tuple[Path, str, str | None]:
    """The file, its sha256, and its address if it has one."""
    if "://" in source and not is_file_url(source):
        if "@" in source:
            expected = "no password: ~/.netrc may hold it"
            raise ArgumentError("add", "URL", got=redact(source), expected=expected)
        check_url(source)
        name = unquote(urlsplit(source).path.rpartition("/")[2])
        done = fetch_file(source, name, sha256=None, report=report)
        return done.path, done.sha256, source
    path = Path(url2pathname(urlsplit(source).path) if is_file_url(source) else source)
    try:
        with path.open("rb") as file:
            return path, cache.hash_of(file), None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoaderError(f"{path} cannot be read: {reason}") from error


def _choose_url(path: Path, entry: dict[str, Any], file: Path, url: str | None) -> None:
    """Enter an address where it is not the one that the lock's pattern gives."""
    pattern = _load(path)["kernels"]["url"]
    usual = pattern.format(release=entry["release"], file=quote(entry["file"]))
    local = entry["file"].split("-")[1].partition("+")[2]
    if url is None and not re.fullmatch(r"(cu\d+)?", local):
        url = file.resolve().as_uri()  # of no published name: built, and so nowhere else
    if url is not None and unquote(url) != unquote(usual):
        entry["url"] = url


def _today() -> str:
    return datetime.date.today().isoformat()


def pin_record_of(path: Path, entry: PinnedWheel) -> Pinned:
    """Enter the sha256 of an entry's RECORD into the lock at `path`.

    It is taken from the file in the cache, where its sha256 was verified, else from
    what the server sends now.
    """
    whole = cache.find(entry.sha256, entry.file)
    if whole is not None:
        record, trust = Wheel(whole).record_sha256, "file-verified"
    else:
        wheel = RemoteWheel(entry.url, size=entry.size, verify="record")
        record, trust = wheel.record_sha256, "record-unpinned"
    if entry.record_sha256 not in (None, record):
        raise ArtifactError(
            f"{entry.file}: RECORD has sha256 {record}, pinned is {entry.record_sha256}"
        )
    if entry.record_sha256 is None:
        _update(path, entry.file, {"record-sha256": record})
    return Pinned(entry.file, record, trust, entry.record_sha256 is None)


def _load(path: Path) -> Any:
    """The document of a lock; `LoaderError` where it cannot be read."""
    try:
        return tomlkit.parse(path.read_text())
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise LoaderError(f"{path} is not a readable lock: {error}") from error


def _update(path: Path, file: str, entry: Mapping[str, object]) -> None:
    """Set keys of the entry of a file."""
    document = _load(path)
    for table in document["kernels"]["files"]:
        if table["file"] == file:
            table.update(entry)
    write(path, tomlkit.dumps(document))


_lock = click.option(
    "--lock",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="By default the one in use.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FiFfiError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("source", metavar="FILE|URL")
@click.option("--release", help="FlashInfer's release, such as 0.6.13.")
@click.option("--cuda", metavar="TAG", help="CUDA tag, such as cu130.")
@click.option("--platform", help="Such as linux-x86_64.")
@click.option("--layout", type=click.Choice(["monolithic", "provider"]))
@click.option("--sm", help="The one architecture in it, such as sm90a.")
@click.option("--provenance", metavar="TEXT", help="Who vouches for the sha256.")
@click.option("--url", help="Where others find the file, if not on FlashInfer's release page.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@_json
@_lock
def add(
    source: str, path: Path | None, as_json: bool, quiet: bool, url: str | None, **given: str | None
) -> None:
    """Hash a kernel wheel, and pin it.

    What an option leaves open is taken from the wheel's name. A URL is read to its end.
    """
    where = path or lock_path()
    chosen = {key: value for key, value in given.items() if value}
    with reporter(quiet) as report:
        done = add_wheel(where, source, chosen, url=url, report=report)
    if as_json:
        result = {"lock": str(where), "updated": done.updated, "entry": done.entry}
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{where}: {'updated' if done.updated else 'added'} {done.entry['file']}")
    for key, value in done.entry.items():
        click.echo(f"  {key:<14}{value}")


@main.command("pin-record")
@click.argument("names", nargs=-1, required=True, metavar="NAME|URL...")
@_json
@_lock
def pin_record(names: tuple[str, ...], path: Path | None, as_json: bool) -> None:
    """Pin the RECORD of entries, by fetching their directory and RECORD alone."""
    where = path or lock_path()
    done = [pin_record_of(where, entry) for entry in entries(read_lock(where), names)]
    if as_json:
        result = {"lock": str(where), "files": [asdict(each) for each in done]}
        click.echo(json.dumps(result, indent=2))
        return
    for each in done:
        click.echo(f"{each.file}: {'pinned' if each.changed else 'already pinned'}")
        click.echo(f"  record-sha256 {each.record_sha256}")
        if each.trust != "file-verified" and each.changed:
            click.echo(
                "  This trusts what the server sent today: `fi-ffi lock verify --full "
                f"{each.file}` checks the whole file against its sha256."
            )


if __name__ == "__main__":
    main()
