"""`fi-ffi lock`: pins wheels, and compares pins with the files at their addresses."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import click

from fi_ffi.catalogue.ahead_of_time import FIRST_OF_PROVIDERS
from fi_ffi.cli.group import NearNames
from fi_ffi.cli.output import print_json, print_table, say
from fi_ffi.errors import ArgumentError, ArtifactError, FetchError, LoaderError
from fi_ffi.loader import cache
from fi_ffi.loader.fetch.download import Reporter, fetch_file
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.pinning import Link, append, describe, links_at
from fi_ffi.loader.fetch.progress import counter, reporter
from fi_ffi.loader.fetch.ranges import NoRanges, RemotePieces
from fi_ffi.loader.fetch.remote import RemoteWheel
from fi_ffi.loader.fetch.urls import is_file_url, redact
from fi_ffi.loader.fetch.wheels_lock import (
    Lock,
    PinnedWheel,
    lock_in_use,
    own_lock_path,
    read_lock,
    this_platform,
)
from fi_ffi.loader.lock import ENVIRONMENT, lock_path
from fi_ffi.loader.search import wanted_release
from fi_ffi.loader.uris import version_of
from fi_ffi.loader.wheel import Wheel

_SHOWN = 12  # wheels of a page that an error lists

Verdict = Literal["ok", "wrong", "not pinned", "not checked"]


@dataclass(frozen=True)
class Checked:
    """The result of checking one entry; `note` says why `status` is not "ok"."""

    file: str
    url: str
    status: Literal["ok", "fail", "unreachable", "not checked"]
    size: Verdict = "not checked"
    record: Verdict = "not checked"
    sha256: Verdict = "not checked"
    note: str = ""


@click.group(cls=NearNames)
def lock() -> None:
    """Add to wheels.lock, which pins every file that may be fetched, and check it.

    Your own pins are in `wheels.lock` of the cache, and are taken before the package's. FI_FFI_LOCK
    names a lock that replaces both.
    """


@lock.command()
@click.argument("url", metavar="URL|PAGE")
@click.argument("file", required=False)
@click.option("--release", help="Of a page's wheels, those of this FlashInfer release.")
@click.option("--cuda", metavar="TAG", help="Those of this CUDA tag, such as cu130.")
@click.option("--sm", help="Those of this architecture, such as sm90a.")
@click.option("--platform", help="Those of this platform (default: this machine's).")
@click.option("--yes", "-y", is_flag=True, help="Pin without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print the entry as JSON.")
def add(
    url: str,
    file: str | None,
    release: str | None,
    cuda: str | None,
    sm: str | None,
    platform: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Pin a kernel wheel by the sha256 in the link to it.

    URL is a wheel's address that ends in `#sha256=...`. PAGE is an HTML page with such links, such
    as a package index's page of `flashinfer-jit-cache-sm90a`; options, or FILE, choose one of them.
    The wheel itself is not fetched. Exits with 1 if nothing was pinned.
    """
    wanted = {"release": release, "cuda": cuda, "sm": sm, "platform": platform or this_platform()}
    page, links = links_at(url)
    link = _chosen(page, links, file, {key: value for key, value in wanted.items() if value})
    entry = _entry(link, page)
    path, above = _written_lock()
    known = next((e for e in lock_in_use().kernels if e.file == link.file), None)
    if known is not None and known.sha256 != entry["sha256"]:
        raise ArtifactError(
            f"{link.file} is pinned with sha256 {known.sha256}, and the link has {entry['sha256']}"
        )
    click.echo(f"{'pinned already, not' if known else 'to be pinned'} in {path}:", err=as_json)
    for key, value in entry.items():
        click.echo(f"  {key:<12}{value}", err=as_json)
    if known is None:
        if not yes:
            click.confirm("Pin it?", abort=True, err=True)
        append(path, entry, above)
    if as_json:
        print_json({"lock": str(path), "added": known is None, "entry": entry})
    elif entry["release"] != wanted_release():
        say(f"FI_FFI_RELEASE={entry['release']} takes kernels of this release.")


def _chosen(page: str, links: Sequence[Link], file: str | None, wanted: Mapping[str, str]) -> Link:
    """Return the only link to a wheel that is wanted; the wheel of an address always is."""
    if len(links) == 1 and links[0].url == page:
        return links[0]
    fitting = {
        link.file: link
        for link in links
        if link.file == file or (file is None and wanted.items() <= describe(link.file).items())
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    what = file or " ".join(f"{key} {value}" for key, value in wanted.items())
    shown = [*fitting] or [*dict.fromkeys(link.file for link in links)]
    some = "".join(f"\n  {name}" for name in shown[:_SHOWN])
    more = f"\n  and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    if fitting:
        raise LoaderError(
            f"{redact(page)} has links to {len(shown)} kernel wheels of {what}: name one of"
            f"{some}{more}"
        )
    has = f"; it has{some}{more}" if shown else ", nor to any other"
    raise LoaderError(f"{redact(page)} has no link to a kernel wheel of {what}{has}")


def _entry(link: Link, page: str) -> dict[str, str]:
    """Return the entry of a link; raise if its name does not say everything, or it has no hash."""
    facts = describe(link.file)
    missing = {"release", "cuda", "platform", "layout"} - facts.keys()
    if missing:
        expected = f"a name with {', '.join(sorted(missing))}"
        raise ArgumentError("lock add", "URL", got=link.file, expected=expected)
    has_none = version_of(facts["release"]) >= version_of(FIRST_OF_PROVIDERS)
    if has_none and facts["layout"] == "monolithic" and "sm" not in facts:
        expected = (
            "the wheel of one SM, such as flashinfer-jit-cache-sm90a, since flashinfer-jit-cache "
            f"itself has no kernels from {FIRST_OF_PROVIDERS} on"
        )
        raise ArgumentError("lock add", "URL", got=link.file, expected=expected)
    today = datetime.date.today().isoformat()
    where = "the given address" if page == link.url else redact(page)
    keys = ("release", "cuda", "platform", "layout", "sm")
    return {key: facts[key] for key in keys if key in facts} | {
        "file": link.file,
        "url": link.url,
        "sha256": link.sha256(),
        "provenance": f"the link's #sha256= in {where}, {today}; not verified here",
    }


def _written_lock() -> tuple[Path, Lock | None]:
    """Return the lock that pins go to, and the one above it if it is the user's own."""
    if os.environ.get(ENVIRONMENT):
        return lock_path(), None
    cache.make_root()
    path = own_lock_path()
    assert path is not None
    return path, read_lock(lock_path())


@lock.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Check the entries of every platform.")
@click.option("--full", is_flag=True, help="Fetch the files whole and check their sha256.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--lock",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The lock (default: the one in use).",
)
def verify(
    names: tuple[str, ...],
    everything: bool,
    full: bool,
    path: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare entries with the files at their addresses.

    A NAME is a file, an address or a release; the default is every entry for this platform.
    Sizes are compared, and RECORDs if the server supports ranges. Exits with 1 if anything
    differs or could not be checked.
    """
    where = path or lock_path()
    platform = None if everything else this_platform()
    chosen = entries(read_lock(path) if path else lock_in_use(), names, platform=platform)
    done = []
    with counter("entries", len(chosen), quiet) as count:
        for entry in chosen:
            count(entry.file)
            with reporter(quiet or not full) as report:
                done.append(check(entry, full=full, report=report))
    if as_json:
        print_json({"lock": str(where), "files": [asdict(each) for each in done]})
    else:
        rows = [(d.file, d.status, d.size, d.record, d.sha256, d.note) for d in done]
        columns = ("file", "status", "size", "RECORD", "sha256", "note")
        print_table(f"{where}", columns, rows)
    if any(d.status != "ok" for d in done):
        sys.exit(1)


def entries(lock: Lock, names: Sequence[str], *, platform: str | None = None) -> list[PinnedWheel]:
    """Return the entries of these files, addresses or releases; by default the platform's."""
    if not names:
        return [entry for entry in lock.kernels if platform in (None, entry.platform)]
    chosen: list[PinnedWheel] = []
    for name in names:
        matching = [e for e in lock.kernels if name in (e.file, e.url, unquote(e.url), e.release)]
        if not matching:
            files = ", ".join(entry.file for entry in lock.kernels)
            got = redact(name) if "@" in name or "://" in name else name
            raise ArgumentError("lock", "NAME", got=got, expected=f"one of {files or 'none'}")
        chosen += [entry for entry in matching if entry not in chosen]
    return chosen


def check(entry: PinnedWheel, *, full: bool = False, report: Reporter | None = None) -> Checked:
    """Compare an entry's pins with the file at its address."""
    document: dict[str, Any] = {"file": entry.file, "url": redact(entry.url)}
    note = ""
    try:
        client = Client()
        try:
            document["size"] = _compare(_size(entry.url, client), entry.size)
            record = RemoteWheel(entry.url, client=client, verify="record").record_sha256
            document["record"] = _compare(record, entry.record_sha256)
        except NoRanges:
            note = "the server has no ranges: `--full` fetches the whole file"
        if full:
            document["sha256"] = "wrong"
            _whole(entry, client, report)
            document["sha256"], note = "ok", ""
    except ArtifactError as error:
        return Checked(**document, status="fail", note=str(error))
    except FetchError as error:
        return Checked(**document, status="unreachable", note=str(error))
    wrong = [key for key in ("size", "record") if document.get(key) == "wrong"]
    if wrong:
        note = f"the address has another {' and '.join(wrong)}"
        return Checked(**document, status="fail", note=note)
    return Checked(**document, status="not checked" if note else "ok", note=note)


def _compare(actual: object, pinned: object) -> Verdict:
    if pinned is None:
        return "not pinned"
    return "ok" if actual == pinned else "wrong"


def _size(url: str, client: Client) -> int:
    if is_file_url(url):
        path = Path(url2pathname(urlsplit(url).path))
        if not path.is_file():
            raise FetchError(f"{path}: there is no such file")
        return path.stat().st_size
    return RemotePieces(url, client).size()


def _whole(entry: PinnedWheel, client: Client, report: Reporter | None) -> None:
    if is_file_url(entry.url):
        Wheel(Path(url2pathname(urlsplit(entry.url).path)), sha256=entry.sha256)
        return
    pins = {"sha256": entry.sha256, "size": entry.size}
    fetch_file(entry.url, entry.file, client=client, report=report, **pins)  # type: ignore[arg-type]
